"""CAD: what is uncertain in one view is covered by what is certain in the other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from nnssl.augmentation.displacement import (
    Windows,
    cell_means,
    cells_with,
    constant_voxels,
    largest_edges,
    replaced,
    source_windows,
    target_windows,
)
from nnssl.losses.components import largest_region
from nnssl.losses.consistency import mean_squared_difference
from nnssl.losses.schedules import sigmoid_rampup
from nnssl.losses.uncertainty import class_divergence, region_divergence
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.bcp import BCP
from nnssl.trainers.engine.requirements import check_value, check_weights
from nnssl.trainers.engine.step import Step
from nnssl.trainers.registry import register
from nnssl.trainers.two_students import TwoStudents


@register
class CAD(TwoStudents, BCP):
    """Confidence-aware adaptive displacement (Xiao et al., 2025, arXiv:2502.00536): a RE-INTERPRETATION.

    There is no released code, and the method section could not be read. Fixed by the abstract: the largest region of
    low confidence is replaced by a patch of high confidence, and its largest size and the threshold of confidence
    change during the training; by a summary: a mean teacher and cross pseudo supervision. All else is taken from
    the ancestor ABD (Chi et al., CVPR 2024, arXiv:2405.00378, code 4efd525, its script on BCP) or chosen. Do not
    publish results as those of CAD before it was compared with the paper.

    Students S1, S2 see the mixed patches of `BCP` in a weak and a strong view v = w, s; teacher T follows S1 and gives
    the labels of each view. With S_v the student of a view, c its confidence (K p_max - 1) / (K - 1), p = share of the
    main phase that is done::

        R_v   = largest connected region of {c_v < tau},   tau = 0.5 + 0.4 p
        W_v   = bounding box of R_v, edges at most (1/8 + 1/8 p) of the patch's: where c_v is lowest
        V_v   = of the 4 windows of that size in the other view with the highest mean c >= tau, the one with the least
                KL(softmax mean o in W_v || softmax mean o in it)
        x~_v  = x_v with the content of V_v in W_v
        L_n   = L_BCP,n + w(p) [Dice(S_n(x_n), argmax S_m(x_m)) + Dice(S_n(x~), argmax S_m(x~))],   m the other one
        L     = L_1 + L_2,   w(p) = exp(-5 (1 - p)^2),   x~: both displaced views,   Dice: 1 - soft Dice

    Images alone are displaced, and no label. Confidence and windows are found on cells of 4 voxels per axis, on the
    device (the largest components of the pseudo-labels of both views, as in `BCP`, on the host). Along axes of fewer
    than 16 voxels windows are as long as the bounding box. Where no window qualifies, a view stays as it is. A source
    is at least as confident as its target. What is constant (padding) never takes part; noise of the augmentation hides
    it. Regions: c = mean |2 p - 1|, KL summed over regions.

    Chosen: schedules (linear); confidence of the student itself; one box per view; the strong view is that of the
    other trainers, without cutout; the ramp w, since nothing is pretrained (``cross_ramp=False`` and
    ``pretrain_share=0.25`` come near ABD, whose students start from one network: here each is pretrained from weights
    of its own, S2 on the strong view). ``input_mix=none`` leaves the mixing of `BCP` out: labels train plain
    patches, S_n is drawn to T on the unlabeled ones (mean squared difference, weight 0.1 w), and these are displaced.
    ``displaced_views=one`` halves the displaced patches. S1 predicts. Curves show the shares of views in which
    something was replaced (``replaced``), and by foreground (``foreground_sources``).
    """

    source = "Xiao et al., 2025, arXiv:2502.00536"
    year = 2025
    status = "re-interpretation"
    memory_factor = 5.9
    pretrain_share = 0.0

    input_mix: Literal["bcp", "none"] = "bcp"
    displaced_views: Literal["both", "one"] = "both"
    threshold_start: float = 0.5
    threshold_end: float = 0.9
    edge_start: float = 1 / 8
    edge_end: float = 1 / 4
    source_candidates: int = 4
    cross_weight: float = 1.0
    cross_ramp: bool = True
    consistency_weight: float = 0.1
    """Weight of the teacher's probabilities with ``input_mix=none``."""
    deploy: Literal["first", "teacher"] = "first"

    def check_settings(self) -> None:
        super().check_settings()
        for name in ("threshold_start", "threshold_end"):
            check_value(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")
        for name in ("edge_start", "edge_end"):
            check_value(self, name, 0 < getattr(self, name) <= 1, "above 0 and at most 1")
        check_weights(self, "cross_weight", "consistency_weight")
        check_value(self, "threshold_end", self.threshold_end >= self.threshold_start, "at least threshold_start")
        check_value(self, "edge_end", self.edge_end >= self.edge_start, "at least edge_start")
        check_value(self, "source_candidates", self.source_candidates >= 1, "at least 1")

    def prepare_step(self, step: Step) -> None:
        # as channels of one image, so that both views are mixed alike
        step.labeled, step.unlabeled = (torch.cat([p, self.strong_view(p)], 1) for p in (step.labeled, step.unlabeled))
        if self.input_mix == "bcp":
            super().prepare_step(step)
        elif self.pretraining:
            step.unlabeled = step.unlabeled[:0]
        step.extra["unlabeled_views"] = step.extra.pop("unlabeled", step.unlabeled).chunk(2, 1)
        step.extra["strong"] = step.images.chunk(2, 1)[1]
        step.labeled, step.unlabeled = step.labeled.chunk(2, 1)[0], step.unlabeled.chunk(2, 1)[0]

    def forward(self, step: Step) -> None:
        super().forward(step)
        step.extra["second_heads"] = self.heads(self.second, step.extra["strong"])

    def labeled_loss(self, step: Step, heads: list[torch.Tensor]) -> torch.Tensor:
        if self.input_mix == "bcp":
            return super().labeled_loss(step, heads)
        return self.segmentation_loss([head[: len(step.labeled)] for head in heads], step.target)

    def pretrain_losses(self, step: Step) -> dict[str, torch.Tensor]:
        losses = super().pretrain_losses(step)
        return {**losses, "second_supervised": self.segmentation_loss(step.extra["second_heads"], step.target)}

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        first, second = step.heads, step.extra["second_heads"]
        teacher = self.heads(self.teacher, torch.cat(step.extra["unlabeled_views"]))[0].chunk(2)
        terms = {"second_supervised": self.labeled_loss(step, second)}
        begin = 0 if self.input_mix == "bcp" else len(step.labeled)
        logits = first[0][begin:], second[0][begin:]
        for prefix, heads, own, target in zip(("", "second_"), (first, second), logits, teacher, strict=True):
            if self.input_mix == "bcp":
                terms[f"{prefix}pseudo"] = self.pseudo_loss(step, heads, target)
            else:
                weight = self.consistency_weight * sigmoid_rampup(step.progress)
                difference = mean_squared_difference(self.probabilities(own), self.probabilities(target))
                terms[f"{prefix}consistency"] = weight * difference
        views = step.images[begin:], step.extra["strong"][begin:]
        displaced = self.displaced(step, views, (logits[0].detach(), logits[1].detach()))
        again = [self.heads(network, displaced)[0] for network in (self.network, self.second)]
        weight = self.cross_weight * (sigmoid_rampup(step.progress) if self.cross_ramp else 1.0)
        for name, (one, other) in {"cross": logits, "displaced": again}.items():
            terms[name] = weight * (1 + self.dice_loss(one, self.hard_labels(other)))
            terms[f"second_{name}"] = weight * (1 + self.dice_loss(other, self.hard_labels(one)))
        return terms

    @torch.no_grad()
    def displaced(
        self, step: Step, views: tuple[torch.Tensor, torch.Tensor], logits: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """Displaced patches of both views, of which each shows content of the unchanged other one."""
        usable = ~cells_with(constant_voxels(views[0]))
        cells = [cell_means(one) for one in logits]
        confidence = [cell_means(self.confidence(one)) for one in logits]
        results, facts = [], []
        for own, other in ((0, 1), (1, 0)):
            targets, sources = self.windows(step.progress, usable, cells, confidence, own, other)
            results.append(replaced(views[own], views[other], targets, sources))
            foreground = self.hard_labels(logits[other]).amax(1, keepdim=True).clamp_max(1).to(views[own].dtype)
            shown = replaced(torch.zeros_like(foreground), foreground, targets, sources)
            facts.append((sources.found.float().mean(), shown.flatten(1).amax(1).mean()))
        names = ("replaced", "foreground_sources")
        step.extra["facts"] = {name: (w + s) / 2 for name, w, s in zip(names, *facts, strict=True)}
        if self.displaced_views == "both":
            return torch.cat(results)
        rows = torch.arange(len(views[0]), device=self.device) + self.ranks.rank * len(views[0]) + step.iteration
        weak, strong = results
        return torch.where((rows % 2 == 0).view(-1, *[1] * (weak.ndim - 1)), weak, strong)

    def windows(
        self,
        progress: float,
        usable: torch.Tensor,
        logits: list[torch.Tensor],
        confidence: list[torch.Tensor],
        own: int,
        other: int,
    ) -> tuple[Windows, Windows]:
        """Where views are replaced, and by what of the other ones; all tensors are means of cells."""
        threshold = self.threshold_start + (self.threshold_end - self.threshold_start) * progress
        share = self.edge_start + (self.edge_end - self.edge_start) * progress
        region = largest_region((confidence[own] < threshold) & usable)
        largest = largest_edges(self.configuration_manager.patch_size, share)
        targets = target_windows(region, confidence[own], usable, largest)
        divergence = region_divergence if self.label_manager.has_regions else class_divergence
        sources = source_windows(
            targets,
            logits[own],
            logits[other],
            confidence[other],
            usable,
            threshold,
            divergence,
            self.source_candidates,
        )
        return targets, sources

    def optimize(self, step: Step) -> dict[str, torch.Tensor]:
        return super().optimize(step) | step.extra.get("facts", {})

    def deployed_network(self) -> nn.Module:
        return unwrap(self.network) if self.deploy == "first" else self.teacher.network
