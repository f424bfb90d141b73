"""SASSNet: signed distance maps that must look alike on labeled and unlabeled patches."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from nnssl.dataloading.rows import count_uniform_rows
from nnssl.dataloading.targets import TargetFunction
from nnssl.errors import UserError
from nnssl.losses.schedules import sigmoid_rampup
from nnssl.losses.signed_distance import SignedDistances
from nnssl.networks.discriminator import MapDiscriminator
from nnssl.networks.features import FeatureTap, head_on_last_stage, last_decoder_stage
from nnssl.networks.frozen import frozen
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.requirements import check_value, check_weights
from nnssl.trainers.engine.step import Step
from nnssl.trainers.registry import register


@register
class SASSNet(SemiSupervisedTrainer):
    """Shape-aware semi-supervised segmentation (Li, Zhang & He, MICCAI 2020, arXiv:2007.10732).

    A second head, a 1x1 convolution and tanh on the last decoder stage, regresses the normalized signed distance map
    z of every foreground class or region (their equation 1). A discriminator D learns whether map and image come from
    a labeled (1) or an unlabeled (0) patch, and the segmenter learns to make maps that pass for labeled ones::

        L = L_nnU-Net(s, y) + sdm_weight * mean((z_l - z(y))^2) + w(p) * CE(D(z_u, x_u), 1)
        L_D = [CE(D(z_l, x_l), 1) + CE(D(z_u, x_u), 0)] / 2,   z detached
        w(p) = adversarial_weight * exp(-5 (1 - p)^2),   p = share of the main phase that is done

    D is fixed in the segmenter's step and drops no channels there; its own step follows (Adam 1e-4, betas 0.9 and 0.99,
    constant). Weights are those of the released code for 16 labeled scans. Distances are in voxels and normalized
    per patch, as published; ``distance_unit=mm`` takes the plan's spacing. They are computed by the augmentation
    workers, one Euclidean distance transform of the patch (and one of the object) per class: with many classes give
    them more cores (nnUNet_n_proc_DA).

    Deviations: nnU-Net's Dice + cross entropy with deep supervision, where the code sums Dice and distances only
    (``voxel_cross_entropy=False``; with its weights in ``recipe=nnunet``). No dropout in the segmenter (nnU-Net has
    none). D sees the maps of the segmenter before its update, which saves a forward pass, and ends with the mean over
    all voxels, for any patch size. Gradients of D are clipped, and in fp16 its loss is scaled by the same scaler, like
    the segmenter's.

    nnU-Net forces the last rows of a labeled batch to show foreground, which no unlabeled patch is. D, which could tell
    them by that alone, is shown the other rows only (``discriminator_rows=uniform``): with the default share of 0.33
    one of two, three of four, and the only one of one. The regional switch places both patches of a pair by one of
    them, so that it needs ``discriminator_rows=all``.

    An ignore label is refused: where the annotation ends, the distance to the object's surface is unknown.
    """

    source = "Li et al., MICCAI 2020, arXiv:2007.10732"
    year = 2020
    status = "official code"
    memory_factor = 3.4
    supports_ignore_label = False

    sdm_weight: float = 0.3
    adversarial_weight: float = 0.01
    discriminator_lr: float = 1e-4
    discriminator_dropout: float = 0.5
    discriminator_features: tuple[int, ...] = (64, 128, 256, 512)
    discriminator_rows: Literal["uniform", "all"] = "uniform"
    distance_unit: Literal["voxels", "mm"] = "voxels"
    voxel_cross_entropy: bool = True

    sdm_head: nn.Module
    discriminator: MapDiscriminator

    def extra_targets(self) -> dict[str, TargetFunction]:
        manager = self.label_manager
        labels = None if manager.has_regions else tuple(manager.foreground_labels)
        spacing = tuple(self.configuration_manager.spacing) if self.distance_unit == "mm" else None
        return {"signed_distances": SignedDistances(labels, spacing)}

    def check_settings(self) -> None:
        super().check_settings()
        check_weights(self, "sdm_weight", "adversarial_weight")
        check_value(self, "discriminator_lr", 0 < self.discriminator_lr < math.inf, "above 0")
        check_value(self, "discriminator_dropout", 0 <= self.discriminator_dropout < 1, "0 to below 1")
        features = self.discriminator_features
        check_value(self, "discriminator_features", bool(features) and min(features) >= 1, "positive numbers")
        if self.discriminator_rows == "uniform" and self.atlas_augmentation != "none":
            raise UserError(
                "with the regional switch any labeled patch may be forced to show foreground, which the discriminator "
                "could tell from unlabeled ones by that alone",
                fix="--set discriminator_rows=all shows it all labeled patches nevertheless, or train without the "
                "switch: --atlas-augmentation none",
            )

    def build_modules(self) -> dict[str, nn.Module]:
        manager = self.label_manager
        maps = len(manager.foreground_regions if manager.has_regions else manager.foreground_labels)
        self.tap = FeatureTap(last_decoder_stage(self.network).module)
        self.labeled_shown, self.labeled_shown_by_all = self._labeled_rows_of_the_discriminator()
        return {
            "sdm_head": head_on_last_stage(self.network, maps),
            "discriminator": MapDiscriminator(
                maps, self.num_input_channels, self.configuration_manager.patch_size, self.discriminator_features
            ),
        }

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        group = {"params": list(self.discriminator.parameters()), "scheduled": False}
        return {"discriminator": torch.optim.Adam([group], self.discriminator_lr, betas=(0.9, 0.99))}

    def _build_loss(self) -> nn.Module:
        loss: Any = super()._build_loss()
        if not self.voxel_cross_entropy:
            (loss.loss if self.enable_deep_supervision else loss).weight_ce = 0
        return loss

    def forward(self, step: Step) -> None:
        step.heads, (feature,) = self.heads_and_features(self.network, step.images, self.tap)
        with self.precision.autocast():
            maps = self.sdm_head(feature)
        step.extra["maps"] = maps.float().tanh()

    def sdm_loss(self, step: Step) -> torch.Tensor:
        """Error of the labeled patches' maps ``(B_l, F, *P)``."""
        maps = step.extra["maps"][: len(step.labeled)]
        return self.sdm_weight * mse_loss(maps, step.extra["signed_distances"].to(maps.dtype))

    def pretrain_losses(self, step: Step) -> dict[str, torch.Tensor]:
        return {**super().pretrain_losses(step), "sdm": self.sdm_loss(step)}

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        with frozen(self.discriminator), self.precision.autocast():
            logits = self.discriminator(step.extra["maps"][len(step.labeled) :], step.unlabeled).float()
        weight = self.adversarial_weight * sigmoid_rampup(step.progress)
        return {"sdm": self.sdm_loss(step), "adversarial": weight * self._taken_for(logits, 1).mean()}

    def optimize(self, step: Step) -> dict[str, torch.Tensor]:
        losses = super().optimize(step)
        if self.pretraining:
            return losses
        loss = self.discriminator_loss(step)
        super().backward_and_update(loss, self._optimizers["discriminator"])
        return {**losses, "discriminator": loss}

    def discriminator_loss(self, step: Step) -> torch.Tensor:
        """Cross entropy of D on this rank, such that the mean over ranks is that of the whole batch."""
        labeled_patches, maps = len(step.labeled), step.extra["maps"].detach()
        labeled = self._verdict(maps[:labeled_patches], step.labeled)[: self.labeled_shown]
        unlabeled = self._verdict(maps[labeled_patches:], step.unlabeled)
        labeled_loss = self._taken_for(labeled, 1).sum() * self.ranks.size / self.labeled_shown_by_all
        return (labeled_loss + self._taken_for(unlabeled, 0).mean()) / 2

    def _verdict(self, maps: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        with self.precision.autocast():
            return self.discriminator(maps, images, self._dropout).float()

    def _dropout(self, features: torch.Tensor) -> torch.Tensor:
        return self.drop_channels(features, self.discriminator_dropout)

    @staticmethod
    def _taken_for(logits: torch.Tensor, kind: int) -> torch.Tensor:
        return cross_entropy(logits, torch.full_like(logits[:, 0], kind, dtype=torch.long), reduction="none")

    def _labeled_rows_of_the_discriminator(self) -> tuple[int, int]:
        """How many labeled patches D sees on this rank, which are its first ones, and on all ranks."""
        batch = self.batch_size * self.ranks.size
        shown = batch
        if self.discriminator_rows == "uniform":
            shown = count_uniform_rows(batch, self.oversample_foreground_percent)
        if shown == 0 or (self.probabilistic_oversampling and self.discriminator_rows == "uniform"):
            raise UserError(
                "every labeled patch may be forced to show foreground, so none can be shown to the discriminator",
                found=f"oversample_foreground_percent={self.oversample_foreground_percent}, {batch} labeled patches",
                fix="--set discriminator_rows=all shows it all labeled patches",
            )
        return min(max(shown - self.ranks.rows(self.batch_size).start, 0), self.batch_size), shown
