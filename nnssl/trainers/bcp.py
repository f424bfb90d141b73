"""Bidirectional copy-paste: labeled into unlabeled patches and the other way round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import nn

from nnssl.augmentation.boxes import box_edges, random_boxes
from nnssl.augmentation.mixing import pair_both_ways
from nnssl.losses.components import largest_components
from nnssl.losses.labels import resized_labels
from nnssl.networks.ema import EMATeacher
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.base import SemiSupervisedTrainer, Status
from nnssl.trainers.engine.requirements import check_value, check_weights
from nnssl.trainers.engine.step import Step
from nnssl.trainers.registry import register


@register
class BCP(SemiSupervisedTrainer):
    """Bidirectional copy-paste (Bai et al., CVPR 2023, arXiv:2305.00673).

    One box with 2/3 of the edges of the patch is pasted in both directions, from the labeled into the unlabeled patch
    and back (M is 1 outside the box; a, b: halves of the batch)::

        x_in = M x_l,a + (1 - M) x_u,a,    x_out = M x_u,b + (1 - M) x_l,b
        L = mean over both of  (Dice + CE)(S(x), y_l; labeled part) + pseudo_weight (Dice + CE)(S(x), y_u; the rest)
        y_u = largest component of the most likely classes of the teacher on x_u
        teacher <- ema_decay teacher + (1 - ema_decay) student

    Before, for 2000 of 17000 steps as published for the left atrium, the student learns from labeled patches pasted
    into each other; then it is copied to the teacher. The sum over both directions of half of Dice + CE, as published,
    is the mean over the mixed patches of nnU-Net's Dice + CE.

    Deviations: nnU-Net's Dice (foreground only; pooled over both directions where the plan pools it over the batch)
    with deep supervision on all heads; the optimizer and schedule of the run's recipe; the last weights of the first
    phase, not the best on test cases, start the second one. The halves are the even and odd rows. Where there are more
    patches of one kind, or one only, those of the other are repeated, such that both directions are equally many. Every
    labeled patch of the first phase gets a box of its neighbor in the batch, hence at least two of them.

    ``largest_component=auto`` keeps the largest component of a single foreground structure only: crops split organs,
    and of several structures the published code does so for ACDC. It is meant for compact organs, so turn it off for
    lesions. The components are found on the host, for which a GPU waits once per step.
    """

    source = "Bai et al., CVPR 2023, arXiv:2305.00673"
    year = 2023
    status: ClassVar[Status] = "official code"
    memory_factor = 1.4
    min_labeled_patches = 2
    plain_supervision = False
    pretrain_share = 2000 / 17000

    box_edge: float = 2 / 3
    """Edge of the box as a share of the patch's."""
    pseudo_weight: float = 0.5
    ema_decay: float = 0.99
    largest_component: Literal["auto", "on", "off"] = "auto"

    teacher: EMATeacher

    def check_settings(self) -> None:
        super().check_settings()
        check_value(self, "box_edge", 0 < self.box_edge < 1, "above 0 and below 1")
        check_weights(self, "pseudo_weight")
        check_value(self, "ema_decay", 0 <= self.ema_decay <= 1, "0 to 1")

    def build_modules(self) -> dict[str, nn.Module]:
        return {"teacher": self.new_teacher()}

    def prepare_step(self, step: Step) -> None:
        if self.pretraining:
            self.paste_labeled(step)
        else:
            self.paste_both_ways(step)

    def draw_masks(self, patches: int, shape: Sequence[int]) -> torch.Tensor:
        """What is pasted: boolean ``(patches, 1, *shape)``, or one row for all of this rank's patches."""
        return random_boxes(1, shape, box_edges(shape, self.box_edge), self.device)

    def paste_labeled(self, step: Step) -> None:
        """Pastes into every labeled patch, and its labels, a part of the one before it in the global batch."""
        box = self.draw_masks(len(step.labeled), step.labeled.shape[2:])

        def with_box(images: torch.Tensor) -> torch.Tensor:
            (mask,) = resized_labels(box, [images.shape[2:]])
            return torch.where(mask, self.ranks.own_rows(self.ranks.all_rows(images).roll(1, 0)), images)

        step.labeled = with_box(step.labeled)
        step.target = [with_box(target) for target in step.target]
        step.unlabeled = step.unlabeled[:0]

    def paste_both_ways(self, step: Step) -> None:
        """Makes ``step.labeled`` the mixed patches; keeps where they are labeled, and what the teacher labels."""
        pairs = pair_both_ways(len(step.labeled), len(step.unlabeled), self.ranks.rank, self.ranks.size, self.device)
        box = self.draw_masks(len(pairs.labeled), step.labeled.shape[2:])
        pasted = pairs.labeled_is_pasted.view(-1, *[1] * (box.ndim - 1))
        is_labeled = box == pasted
        step.extra = {
            "unlabeled": step.unlabeled,
            "rows": pairs.unlabeled,
            "is_labeled": resized_labels(is_labeled, [target.shape[2:] for target in step.target]),
        }
        step.labeled = torch.where(is_labeled, step.labeled[pairs.labeled], step.unlabeled[pairs.unlabeled])
        step.target = [target[pairs.labeled] for target in step.target]
        step.unlabeled = step.unlabeled[:0]

    def pretrain_losses(self, step: Step) -> dict[str, torch.Tensor]:
        self.forward(step)
        return {"supervised": self.segmentation_loss(step.heads, step.target)}

    def supervised_loss(self, step: Step) -> torch.Tensor:
        return self.labeled_loss(step, step.heads)

    def labeled_loss(self, step: Step, heads: list[torch.Tensor]) -> torch.Tensor:
        """Loss of the labeled parts of mixed patches, of which ``heads`` are the logits."""
        return self.masked_segmentation_loss(heads, step.target, step.extra["is_labeled"])

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        return {"pseudo": self.pseudo_loss(step, step.heads, self.teacher_logits(step))}

    def pseudo_loss(self, step: Step, heads: list[torch.Tensor], teacher_logits: torch.Tensor) -> torch.Tensor:
        """Weighted loss of the other parts, against labels that the teacher has given the unlabeled patches."""
        labels = self.pseudo_labels(teacher_logits)[step.extra["rows"]]
        targets = resized_labels(labels, [head.shape[2:] for head in heads])
        is_unlabeled = [~mask for mask in step.extra["is_labeled"]]
        return self.pseudo_weight * self.masked_segmentation_loss(heads, targets, is_unlabeled)

    def teacher_logits(self, step: Step) -> torch.Tensor:
        """The teacher's logits of the unlabeled patches before they were mixed; no gradient."""
        (logits,) = self.heads(self.teacher, step.extra["unlabeled"])
        return logits

    def pseudo_labels(self, logits: torch.Tensor) -> torch.Tensor:
        """Hard labels of the teacher, cleaned."""
        labels = self.hard_labels(logits)
        structures = logits.shape[1] if self.label_manager.has_regions else logits.shape[1] - 1
        clean = self.largest_component == "on" or (self.largest_component == "auto" and structures == 1)
        return largest_components(labels) if clean else labels

    def after_step(self, step: Step) -> None:
        self.teacher.update(unwrap(self.network), self.ema_decay)
