"""C3S3: two networks of different architecture, of which the better one teaches the other."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnssl.losses.consistency import cosine_distance, mean_squared_difference
from nnssl.losses.contrast import intersection_union_contrast, projected_cosine
from nnssl.losses.labels import class_masks
from nnssl.losses.schedules import sigmoid_rampup
from nnssl.networks.ensemble import Ensemble
from nnssl.networks.features import FeatureTap, affine_map, last_decoder_stage, projector_on_last_stage
from nnssl.networks.unwrap import unwrap
from nnssl.networks.variants import counterpart
from nnssl.trainers.engine.requirements import check_value, check_weights
from nnssl.trainers.engine.step import Step
from nnssl.trainers.registry import register
from nnssl.trainers.two_students import TwoStudents


@register
class C3S3(TwoStudents):
    """Complementary competition and contrastive selection (He et al., ICME 2025, arXiv:2506.07368).

    Network A is the planned one; B has the same plan with residual blocks in its encoder (or plain ones, if the planned
    has residual ones). Both see two views v = 1, 2 of each patch; o are logits, p probabilities, z embeddings::

        L = sum over networks n of [L_sup,n + L_cos,n] + w(p) L_cp(loser) + contrast_weight * sum_ij L_iuc(A_i, B_j)
        L_sup,n = mean over v of L_nnU-Net(o_n^v, y),   L_cos,n = mean(1 - cos(o_n^1, o_n^2))
        comp_n  = sum over v of  alpha CE(o_n^v, y) + (1 - alpha) Dice(p_n^v, y);  the lower one wins, B where equal
        L_cp    = sum over v of  mean over unlabeled (p_loser^v - sharpened p_winner^v)^2
        w(p)    = competition_weight * exp(-5 (1 - p)^2),   p = share of the main phase that is done

    Sharpened probabilities are p^(1/T) / sum p^(1/T), T = 0.1, without gradient. L_iuc (see `nnssl.losses.contrast`)
    attracts and repels the embeddings of both networks, by the intersection and union of their most likely classes, on
    all patches; with several classes it is the mean over those that either network sees. The embeddings are made of
    the last decoder stage by two 1x1 convolutions; only their dot products are computed, from the channels before the
    second one, and recomputed in the backward pass. A and B are each trained by an optimizer of their own.

    Deviations from the released code (983bdf5 and later; the paper was not read): nnU-Net's U-Nets instead of V-Net and
    a V-Net with the encoder of ResNet-34. View 1 is the patch as nnU-Net augments it and view 2 a strong view of it
    (`nnssl.augmentation.strong`): in the code, the views differ by dropout, which nnU-Net has none of. Their cosine is
    taken along classes; ``cosine_axis=last`` is the code's, the last spatial axis, which depends on how patches are
    oriented; a single region has but one logit per voxel, whose direction is its sign, so take ``last`` there. One
    backward pass: L_iuc, which the code adds to the losses of both networks and so counts twice, has the weight 2. The
    Dice of the competition is nnU-Net's, per patch. The ramp w ends with the training; alpha is that for the left
    atrium (pancreas: 0.5). Deep supervision for L_sup only. Pretrained weights go into A, to which alone they fit.

    The mean of both networks predicts (`Ensemble`), ``deploy=first`` A alone, ``deploy=second`` B alone. nnssl_predict
    knows all three. Stock nnU-Net can use ``first`` only: it builds the planned network from a checkpoint, and averages
    folds; nnssl_export refuses the others. Curves show how often A wins (``first_wins``).
    """

    source = "He et al., ICME 2025, arXiv:2506.07368"
    year = 2025
    status = "official code"
    memory_factor = 9.6
    plain_supervision = False
    deploys_ensemble = True

    competition_weight: float = 0.1
    competition_alpha: float = 0.8
    sharpening: float = 0.1
    """T."""
    contrast_weight: float = 2.0
    contrast_temperature: float = 0.1
    embedding_channels: int = 64
    cosine_weight: float = 1.0
    cosine_axis: Literal["class", "last"] = "class"
    deploy: Literal["first", "second", "mean"] = "mean"

    projector: nn.Sequential
    second_projector: nn.Sequential

    @staticmethod
    def build_member_architecture(
        i: int, plans_manager: Any, configuration_manager: Any, inputs: int, outputs: int, enable_deep_supervision: bool
    ) -> nn.Module:
        """Network A (0) or B (1)."""
        if i == 0:
            return nnUNetTrainer.build_network_architecture(
                plans_manager, configuration_manager, inputs, outputs, enable_deep_supervision
            )
        other = counterpart(
            configuration_manager.network_arch_class_name,
            configuration_manager.network_arch_init_kwargs,
            configuration_manager.network_arch_init_kwargs_req_import,
        )
        return get_network_from_plans(*other, inputs, outputs, deep_supervision=enable_deep_supervision)

    def new_second(self) -> nn.Module:
        return self.new_network(partial(self.build_member_architecture, 1))

    def check_settings(self) -> None:
        super().check_settings()
        check_weights(self, "competition_weight", "contrast_weight", "cosine_weight")
        check_value(self, "competition_alpha", 0 <= self.competition_alpha <= 1, "0 to 1")
        check_value(self, "sharpening", 0 < self.sharpening <= 1, "above 0 and at most 1")
        check_value(self, "contrast_temperature", 0 < self.contrast_temperature < math.inf, "above 0")
        check_value(self, "embedding_channels", self.embedding_channels >= 1, "at least 1")

    def build_modules(self) -> dict[str, nn.Module]:
        modules = super().build_modules()
        networks = self.network, modules["second"]
        self.taps = [FeatureTap(last_decoder_stage(network).module) for network in networks]
        names = ("projector", "second_projector")
        projectors = [projector_on_last_stage(network, self.embedding_channels) for network in networks]
        return modules | dict(zip(names, projectors, strict=True))

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        optimizers = super().build_optimizers()
        optimizers["second"].add_param_group({"params": list(self.second_projector.parameters())})
        return optimizers

    def prepare_step(self, step: Step) -> None:
        step.extra["view"] = torch.cat([self.strong_view(part) for part in (step.labeled, step.unlabeled)])

    def forward(self, step: Step) -> None:
        """Keeps ``heads[network][view]``, each a list over heads, and ``features[network][view]``."""
        images = torch.cat([step.images, step.extra["view"][: len(step.images)]])
        step.extra["heads"], step.extra["features"] = [], []
        for network, tap in zip((self.network, self.second), self.taps, strict=True):
            heads, (feature,) = self.heads_and_features(network, images, tap)
            step.extra["heads"].append([list(view) for view in zip(*(head.chunk(2) for head in heads), strict=True)])
            step.extra["features"].append(feature.chunk(2))
        step.heads = step.extra["heads"][0][0]

    def supervised_loss(self, step: Step) -> torch.Tensor:
        return self.loss_of(step, 0)

    def loss_of(self, step: Step, network: int) -> torch.Tensor:
        """nnU-Net's loss of one network on the labeled patches, mean over both views."""
        views = [[head[: len(step.labeled)] for head in heads] for heads in step.extra["heads"][network]]
        return (self.segmentation_loss(views[0], step.target) + self.segmentation_loss(views[1], step.target)) / 2

    def pretrain_losses(self, step: Step) -> dict[str, torch.Tensor]:
        return {**super().pretrain_losses(step), "second_supervised": self.loss_of(step, 1)}

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        logits = [[heads[0] for heads in views] for views in step.extra["heads"]]
        axis = 1 if self.cosine_axis == "class" else -1
        cosine = [self.cosine_weight * cosine_distance(one, other, axis).mean() for one, other in logits]
        weight = self.competition_weight * sigmoid_rampup(step.progress)
        first_wins = self.first_wins(step, logits)
        step.extra["facts"] = {"first_wins": first_wins.float()}
        unlabeled = [[view[len(step.labeled) :] for view in views] for views in logits]
        return {
            "second_supervised": self.loss_of(step, 1),
            "cosine": cosine[0],
            "second_cosine": cosine[1],
            "competition": weight * self.competition_loss(first_wins, *unlabeled),
            "contrast": self.contrast_weight * self.contrast_loss(step.extra["features"], logits),
        }

    @torch.no_grad()
    def first_wins(self, step: Step, logits: list[list[torch.Tensor]]) -> torch.Tensor:
        """Whether network A is the better one on the labeled patches, a boolean on the device."""
        regions = self.label_manager.has_regions
        dice = MemoryEfficientSoftDiceLoss(self.probabilities, batch_dice=False, do_bg=regions, smooth=1e-5, ddp=False)
        scores = []
        for views in logits:
            score = torch.zeros((), device=self.device)
            for view in views:
                labeled = view[: len(step.labeled)].detach()
                labels, annotated = self.annotation(labeled, step.target[0])
                overlap = dice(labeled, labels, loss_mask=annotated)
                score += self.competition_alpha * self.cross_entropy(labeled, step.target[0])
                score += (1 - self.competition_alpha) * overlap
            scores.append(score)
        first, second = self.ranks.mean(torch.stack(scores))
        return first < second

    def competition_loss(
        self, first_wins: torch.Tensor, first: list[torch.Tensor], second: list[torch.Tensor]
    ) -> torch.Tensor:
        """L_cp of logits ``(B_u, K, *P)`` per view."""
        total = torch.zeros((), device=self.device)
        for one, other in zip(first, second, strict=True):
            winner, loser = torch.where(first_wins, one, other), torch.where(first_wins, other, one)
            # powers of probabilities are multiples of logits
            target = self.probabilities(winner.detach() / self.sharpening)
            total = total + mean_squared_difference(self.probabilities(loser), target)
        return total

    def contrast_loss(
        self, features: list[tuple[torch.Tensor, torch.Tensor]], logits: list[list[torch.Tensor]]
    ) -> torch.Tensor:
        """Sum of L_iuc over the four pairs of views of A and B."""
        seen = [[self.structures(view) for view in views] for views in logits]
        losses = []
        for i in range(2):
            for j in range(2):
                # patch by patch and recomputed, as it takes several tensors of the size of the features
                pairs = zip(features[0][i].split(1), features[1][j].split(1), strict=True)
                similarity = torch.cat([checkpoint(self.similarity, *pair, use_reentrant=False) for pair in pairs])
                first, second = seen[0][i], seen[1][j]
                each = intersection_union_contrast(
                    similarity, first, second, self.contrast_temperature, self.ranks.all_values
                )
                anywhere = (first | second).transpose(0, 1).flatten(1).any(1)
                counts = self.ranks.mean(anywhere.float()) > 0
                # all classes where none is seen
                counts = (counts | ~counts.any()).float()
                losses.append((each * counts).sum() / counts.sum())
        return torch.stack(losses).sum()

    def similarity(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Cosine of the embeddings of features of A and B for each voxel ``(N, 1, *P)``."""
        projectors = self.projector, self.second_projector
        matrices = affine_map(self.projector[-1]), affine_map(self.second_projector[-1])
        with self.precision.autocast():
            hidden = [p[:-1](features) for p, features in zip(projectors, (first, second), strict=True)]
        # in the precision of the weights
        one, other = (h.to(matrix) for h, matrix in zip(hidden, matrices, strict=True))
        return projected_cosine(one, other, matrices)[:, None]

    def structures(self, logits: torch.Tensor) -> torch.Tensor:
        """Where each foreground class, or region, is the prediction; boolean ``(N, C, *P)``."""
        labels = self.hard_labels(logits)
        if self.label_manager.has_regions:
            return labels
        return class_masks(labels, logits.shape[1])[:, 1:]

    def optimize(self, step: Step) -> dict[str, torch.Tensor]:
        return super().optimize(step) | step.extra.get("facts", {})

    def deployed_network(self) -> nn.Module:
        first = unwrap(self.network)
        if self.deploy == "first":
            return first
        members = {1: self.second} if self.deploy == "second" else {0: first, 1: self.second}
        return Ensemble(members, self.label_manager.has_regions)
