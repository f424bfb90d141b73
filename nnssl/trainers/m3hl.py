"""M3HL: mutual mixing of blocks of two patches, and features of two levels that agree."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import torch
from torch import nn

from nnssl.augmentation.blocks import block_edges, count_blocks, random_blocks
from nnssl.augmentation.mixing import partners
from nnssl.losses.consistency import cosine_distance
from nnssl.networks.features import FeatureTap, bottleneck, last_decoder_stage, max_pooled, total_strides
from nnssl.trainers.bcp import BCP
from nnssl.trainers.engine.requirements import check_value, check_weights
from nnssl.trainers.engine.step import Step
from nnssl.trainers.registry import register


@register
class M3HL(BCP):
    """Mutual mask mix with high-low level feature consistency (Liu et al., MICCAI 2025, arXiv:2508.03752).

    Descends from `BCP`, whose pairs, pseudo-labels, weights, losses and teacher it shares. Instead of one box, half of
    the blocks of a grid of 4 blocks per axis are exchanged, drawn anew for every two pairs a, b; both have the same
    mask M (0 in the drawn blocks) with exchanged roles. Features of the student S on the mixed patches are drawn to
    those of the teacher T on the unmixed unlabeled ones, in all four combinations of the two pairs::

        x_1 = M x_l,a + (1 - M) x_u,a,    x_2 = M x_u,b + (1 - M) x_l,b
        L = L_BCP + feature_weight * (L_low + L_high)
        L_low  = mean over x in {x_1, x_2}, u in {x_u,a, x_u,b} of  mean |f_low(S, x) - f_low(T, u)|
        L_high = mean over the same of  1 - cos(f_high(S, x), f_high(T, u))

    f_low is the output of the last decoder stage; f_high the bottleneck after maximum pooling (edge 3, stride 2; not
    along axes of fewer than 3 voxels), as one vector per patch.

    Written from the released code (19151b3), as the method section could not be read. Its 3D script returns a mask of
    ones, so that nothing is ever mixed; here 2D and 3D do what its 2D script does. Deviations beside those of `BCP`:
    edges of blocks are a quarter of the patch's rounded to multiples of the network's stride, so that masks are exact
    at every resolution, and smaller blocks cover the remainder, which the code leaves out. The teacher starts as a
    copy of the student, the code's at random. There is no first phase, as in the code; ``pretrain_share=0.12`` brings
    that of BCP back, with blocks. ``mask_ratio_spread=0.2`` draws the share of exchanged blocks from 0.3 to 0.7 in each
    step, for the paper's "adjustable" masks. The student predicts.
    """

    source = "Liu et al., MICCAI 2025, arXiv:2508.03752"
    year = 2025
    memory_factor = 1.5
    pretrain_share = 0.0

    blocks_per_axis: int = 4
    mask_ratio: float = 0.5
    """Share of the blocks that are exchanged."""
    mask_ratio_spread: float = 0.0
    """Half of the interval about ``mask_ratio`` from which each step draws its share."""
    feature_weight: float = 0.5

    edges: tuple[int, ...]
    student_taps: tuple[FeatureTap, FeatureTap]
    teacher_taps: tuple[FeatureTap, FeatureTap]

    def check_settings(self) -> None:
        super().check_settings()
        check_value(self, "blocks_per_axis", self.blocks_per_axis >= 2, "at least 2")
        check_value(self, "mask_ratio", 0 < self.mask_ratio < 1, "above 0 and below 1")
        smallest, largest = self.mask_ratio - self.mask_ratio_spread, self.mask_ratio + self.mask_ratio_spread
        usable = self.mask_ratio_spread >= 0 and smallest > 0 and largest < 1
        check_value(self, "mask_ratio_spread", usable, "0 or more, such that all shares are above 0 and below 1")
        check_weights(self, "feature_weight")

    def build_modules(self) -> dict[str, nn.Module]:
        shape = self.configuration_manager.patch_size
        self.edges = block_edges(shape, total_strides(self.network), self.blocks_per_axis)
        blocks = count_blocks(shape, self.edges)
        enough = (self.mask_ratio - self.mask_ratio_spread) * blocks >= 1
        check_value(self, "mask_ratio", enough, f"enough for one of the {blocks} blocks of a patch")
        modules = super().build_modules()
        self.student_taps, self.teacher_taps = taps(self.network), taps(modules["teacher"])
        return modules

    def draw_masks(self, patches: int, shape: Sequence[int]) -> torch.Tensor:
        """One mask of blocks for every two patches in turn."""
        ratio = self.mask_ratio + self.mask_ratio_spread * random.uniform(-1, 1)
        everyone = patches * self.ranks.size
        masks = random_blocks(math.ceil(everyone / 2), shape, self.edges, ratio, self.device)
        return self.ranks.own_rows(masks.repeat_interleave(2, 0)[:everyone])

    def forward(self, step: Step) -> None:
        step.heads, step.extra["features"] = self.heads_and_features(self.network, step.images, *self.student_taps)

    def teacher_logits(self, step: Step) -> torch.Tensor:
        (logits,), features = self.heads_and_features(self.teacher, step.extra["unlabeled"], *self.teacher_taps)
        step.extra["teacher_features"] = [feature[step.extra["rows"]] for feature in features]
        return logits

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        terms = super().unsupervised_loss(step)
        high, low = step.extra["features"]
        teacher_high, teacher_low = step.extra["teacher_features"]
        terms["high"] = self.feature_weight * self.both(self.high_distance, high, teacher_high)
        terms["low"] = self.feature_weight * self.both(self.low_distance, low, teacher_low)
        return terms

    def both(self, distance: Callable[..., torch.Tensor], student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Mean distance of mixed patches to the unlabeled patch of their own pair and to that of the other pair."""
        return (distance(student, teacher) + distance(student, self.others(teacher))) / 2

    def others(self, features: torch.Tensor) -> torch.Tensor:
        """Features of the other pair that shares the mask, which may be on another rank."""
        if len(features) % 2 == 0:
            return partners(features)
        return self.ranks.own_rows(partners(self.ranks.all_rows(features)))

    @staticmethod
    def high_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """1 - cosine of the pooled bottlenecks ``(N, C, *S)`` as vectors, mean over the patches; 0 to 2."""
        vector, target = (max_pooled(feature.float()).flatten(1) for feature in (student, teacher.detach()))
        return cosine_distance(vector, target).mean()

    @staticmethod
    def low_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Mean absolute difference of features ``(N, C, *S)``."""
        return (student - teacher.detach()).abs().mean(dtype=torch.float32)


def taps(network: nn.Module) -> tuple[FeatureTap, FeatureTap]:
    """Taps of the high and the low level of a U-Net."""
    return FeatureTap(bottleneck(network).module), FeatureTap(last_decoder_stage(network).module)
