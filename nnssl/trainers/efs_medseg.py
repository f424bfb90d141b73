"""EFS-MedSeg: few atlases, switched regionally, and an encoder that reconstructs images and tells structures apart."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import normalize

from nnssl.losses.labels import class_masks, resized_labels
from nnssl.losses.prototypes import masked_prototypes, paired_contrast, structure_contrast
from nnssl.losses.reconstruction import RunningDice, block_weights, class_weights, overlap_counts, region_weights
from nnssl.losses.schedules import linear_rampup
from nnssl.networks.features import (
    FeatureTap,
    block_means,
    bottleneck,
    encoder_stages,
    last_but_one_decoder_stage,
    vector_projector,
    voxel_projector,
)
from nnssl.networks.memory_format import set_memory_format
from nnssl.networks.micro_batch import in_parts
from nnssl.networks.unwrap import unwrap
from nnssl.networks.variational import ImageDecoder, LatentGaussian, kl_to_standard_normal, sample
from nnssl.trainers.base import SemiSupervisedTrainer, Status
from nnssl.trainers.engine.requirements import check_value, check_weights
from nnssl.trainers.engine.step import Step
from nnssl.trainers.registry import register


@register
class EFSMedSeg(SemiSupervisedTrainer):
    """EFS-MedSeg (Zhou et al., Medical Image Analysis 104, 2025, doi:10.1016/j.media.2025.103637).

    A re-implementation from the published description: abstract and keywords name the parts; their form is chosen
    here, in part after the group's OS-MedSeg (arXiv:2408.03616). Labeled patches come in pairs of two atlases that
    exchange boxes at corresponding positions (``atlas_augmentation=regional_switch``); both of a pair train. From the
    bottleneck h of the segmentation's encoder a variational branch reconstructs labeled and unlabeled patches x::

        L = L_nnU-Net(switched) + reconstruction_weight L_rec + kl_weight r(p) L_KL + contrast_weight L_con
        z = mu(h) + eps exp(log var(h) / 2),   L_rec = sum_v w(v) (x(v) - D_r(z)(v))^2 / sum_v w(v)
        w(v) = 1 + dice_weight (1 - D_c(v)),   D_k <- 0.9 D_k + 0.1 Dice_k(batch),   D = 0 at first
        L_KL = mean of (mu^2 + var - log var - 1) / 2,   r(p): 0 to 1 over the first tenth of the main phase
        L_con: InfoNCE of structure prototypes (`nnssl.losses.prototypes`), the same structure attracting

    c(v) is the label, on unlabeled patches the most likely class; w = 1 in the first 5 %. D_r has no skip connections,
    through which it could copy the image (``reconstruction_skips`` adds them). A prototype is the mean of projected
    features of the last but one decoder stage over the labeled voxels of a foreground structure, on unlabeled patches
    weighed by the prediction, and only after the first 20 %; structures of fewer than ``prototype_voxels`` there have
    none. One pass serves all terms; prototypes, Dice and means are those of the batch of all ranks. A stock nnU-Net is
    deployed.

    Readings of what is not published: ``dice_area=block`` weighs blocks of 16 voxels of labeled patches by the Dice
    inside instead of classes; ``reconstruct_from=features+prediction`` shows mu and log var the probabilities beside h;
    ``contrast=global`` compares image and reconstruction (NT-Xent of one vector each, one more pass of the encoder)
    instead of structures. Ablations: ``atlas_augmentation=none``, ``dice_weight=0``, ``reconstruction_weight=0`` with
    ``kl_weight=0``, ``contrast_weight=0``; all of them leave `Supervised`.

    Deviations: the optimizer of the run's recipe, nnU-Net's batch and augmentation; D_r ends with a convolution of
    kernel 1. Region labels have one D per region, a voxel weighs as its worst region, and each region is a structure.
    Unannotated voxels weigh 1. Where normalization keeps the outside of the body at zero, it is not reconstructed.
    """

    source = "Zhou et al., Medical Image Analysis 2025, doi:10.1016/j.media.2025.103637"
    year = 2025
    status: ClassVar[Status] = "re-interpretation"
    memory_factor = 3.1
    min_labeled = 2
    min_labeled_patches = 2

    atlas_augmentation = "regional_switch"
    reconstruction_weight: float = 1.0
    kl_weight: float = 0.01
    contrast_weight: float = 0.01
    dice_weight: float = 1.0
    """How much more a voxel weighs in the reconstruction whose class has Dice 0 than one of Dice 1."""
    dice_area: Literal["class", "block"] = "class"
    reconstruct_from: Literal["features", "features+prediction"] = "features"
    reconstruction_skips: bool = False
    """Whether the reconstruction has skip connections from the encoder, as in OS-MedSeg."""
    contrast: Literal["prototypes", "global"] = "prototypes"
    temperature: float = 0.5
    prototype_voxels: int = 32
    equal_weights_share: float = 0.05
    """Share of the main phase in which all voxels weigh the same."""
    kl_rampup_share: float = 0.1
    labeled_contrast_share: float = 0.2
    """Share of the main phase in which unlabeled patches have no prototypes."""

    latent: LatentGaussian
    image_decoder: ImageDecoder
    projector: nn.Module
    running_dice: RunningDice

    def check_settings(self) -> None:
        check_weights(self, "reconstruction_weight", "kl_weight", "contrast_weight", "dice_weight")
        for name in ("equal_weights_share", "kl_rampup_share", "labeled_contrast_share"):
            check_value(self, name, 0 <= getattr(self, name) <= 1, "0 to 1")
        check_value(self, "temperature", 0 < self.temperature < math.inf, "above 0")
        # with 0, structures that a patch does not show would have prototypes
        check_value(self, "prototype_voxels", self.prototype_voxels >= 1, "at least 1")
        possible = self.contrast == "prototypes" or self.contrast_weight == 0 or self.reconstruction_weight > 0
        check_value(self, "contrast", possible, "prototypes, since without reconstruction_weight no image is made")

    def build_modules(self) -> dict[str, nn.Module]:
        lowest, dimensions = bottleneck(self.network), len(self.configuration_manager.patch_size)
        structures = self.label_manager.num_segmentation_heads
        modules: dict[str, nn.Module] = {}
        self.taps: dict[str, FeatureTap] = {}
        if self.reconstruction_weight > 0 or self.kl_weight > 0:
            shown = lowest.channels + (structures if self.reconstruct_from == "features+prediction" else 0)
            modules["latent"] = LatentGaussian(dimensions, shown, lowest.channels)
        if self.reconstruction_weight > 0:
            decoder = ImageDecoder(self.network, self.num_input_channels, self.reconstruction_skips)
            modules["image_decoder"] = decoder.to(self.device)
            set_memory_format(modules["image_decoder"], self.memory_format)
            if self._do_i_compile():
                modules["image_decoder"].compile()
            if self.dice_weight > 0 and self.dice_area == "class":
                modules["running_dice"] = RunningDice(structures)
        if modules or (self.contrast_weight > 0 and self.contrast == "global"):
            self.taps["bottleneck"] = FeatureTap(lowest.module)
        if "image_decoder" in modules and self.reconstruction_skips:
            stages = encoder_stages(self.network)[:-1]
            self.taps |= {f"skipped {number}": FeatureTap(stage.module) for number, stage in enumerate(stages)}
        if self.contrast_weight > 0 and self.contrast == "global":
            modules["projector"] = vector_projector(lowest)
        elif self.contrast_weight > 0:
            stage = last_but_one_decoder_stage(self.network)
            modules["projector"] = voxel_projector(stage, dimensions)
            self.taps["stage"] = FeatureTap(stage.module)
        return modules

    def forward(self, step: Step) -> None:
        step.heads, features = self.heads_and_features(self.network, step.images, *self.taps.values())
        step.extra |= dict(zip(self.taps, features, strict=True))

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        losses = {}
        if "latent" in self._modules:
            mean, log_variance = self.latent_image(step)
            weight = self.kl_weight * linear_rampup(step.progress, self.kl_rampup_share)
            losses["kl"] = weight * kl_to_standard_normal(mean, log_variance)
        if self.reconstruction_weight > 0:
            labeled = len(step.labeled)
            noise = torch.cat([self.randn_like(part) for part in (mean[:labeled], mean[labeled:])])
            skipped = [features for name, features in step.extra.items() if name.startswith("skipped ")]
            images = self.reconstruction(sample(mean, log_variance, noise), *skipped)
            step.extra["reconstruction"] = images
            step.extra["weights"] = self.voxel_weights(step)
            error = self.masked_mean((images - step.images).square(), step.extra["weights"])
            losses["reconstruction"] = self.reconstruction_weight * error
        if self.contrast_weight > 0:
            contrast = self.structure_loss if self.contrast == "prototypes" else self.image_loss
            losses["contrast"] = self.contrast_weight * contrast(step)
        return losses

    def latent_image(self, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logarithm of the variance of z for labeled, then unlabeled patches."""
        features = step.extra["bottleneck"]
        if self.reconstruct_from == "features+prediction":
            prediction = self.probabilities(step.heads[0])
            features = torch.cat([features, block_means(prediction, features.shape[2:]).to(features.dtype)], 1)
        with self.precision.autocast():
            return self.latent(features)

    def reconstruction(self, latent: torch.Tensor, *skipped: torch.Tensor) -> torch.Tensor:
        """Images ``(N, C, *P)`` in float32, made of latent ones and what skips the bottleneck, if anything does."""

        def decoded(part: torch.Tensor, *skipped: torch.Tensor) -> list[torch.Tensor]:
            with self.precision.autocast():
                return [self.image_decoder(part.contiguous(memory_format=self.memory_format), *skipped).float()]

        return in_parts(decoded, latent, self.settings.micro_batch, *skipped)[0]

    @torch.no_grad()
    def voxel_weights(self, step: Step) -> torch.Tensor:
        """w for labeled, then unlabeled patches ``(N, 1 or C, *P)``; 0 where nothing is to be reconstructed."""
        weights = torch.ones_like(step.images[:, :1])
        if self.dice_weight > 0 and step.progress >= self.equal_weights_share:
            labels, annotated = self.annotation(step.labeled_logits, step.target[0])
            of_labeled = self._weights_of_labeled(self.hard_labels(step.labeled_logits), labels, annotated)
            if annotated is not None:
                of_labeled = torch.where(annotated, of_labeled, 1.0)
            weights[: len(step.labeled)] = of_labeled
            if self.dice_area == "class":
                weights[len(step.labeled) :] = self._weights_of(self.hard_labels(step.unlabeled_logits))
        if any(self.configuration_manager.use_mask_for_norm or ()):
            return weights * (step.images != 0)
        return weights

    def _weights_of(self, labels: torch.Tensor) -> torch.Tensor:
        weights = region_weights if self.label_manager.has_regions else class_weights
        return weights(labels, self.running_dice.dice, self.dice_weight)

    def _weights_of_labeled(
        self, predicted: torch.Tensor, labels: torch.Tensor, annotated: torch.Tensor | None
    ) -> torch.Tensor:
        if self.dice_area == "class":
            return self._weights_of(labels)
        found, true = self.masks(predicted), self.masks(labels)
        if annotated is not None:
            found, true = found & annotated, true & annotated
        return block_weights(found, true, self.dice_weight)

    def masks(self, labels: torch.Tensor) -> torch.Tensor:
        """Masks ``(N, K, *S)`` of all classes, or of regions, which labels are already."""
        regions = self.label_manager.has_regions
        return labels.bool() if regions else class_masks(labels, self.label_manager.num_segmentation_heads)

    def structure_loss(self, step: Step) -> torch.Tensor:
        """Contrast of the prototypes of all ranks."""
        with self.precision.autocast():
            features = self.projector(step.extra["stage"])
        features = normalize(features.float(), dim=1)
        labels, _ = self.annotation(step.labeled_logits, step.target[0])
        masks = self.masks(resized_labels(labels, [features.shape[2:]])[0]).float()
        if step.progress >= self.labeled_contrast_share:
            (logits,) = resized_labels(step.unlabeled_logits.detach(), [features.shape[2:]])
            masks = torch.cat([masks, self.probabilities(logits)])
        foreground = masks if self.label_manager.has_regions else masks[:, 1:]
        prototypes, present = masked_prototypes(features[: len(masks)], foreground, self.prototype_voxels)
        return structure_contrast(self.ranks.joined_rows(prototypes), self.ranks.all_rows(present), self.temperature)

    def image_loss(self, step: Step) -> torch.Tensor:
        """Contrast of the images of all ranks with their reconstructions."""

        def lowest(part: torch.Tensor) -> list[torch.Tensor]:
            with self.precision.autocast():
                return [unwrap(self.network).encoder(part.contiguous(memory_format=self.memory_format))[-1]]  # type: ignore

        (again,) = in_parts(lowest, step.extra["reconstruction"], self.settings.micro_batch)
        with self.precision.autocast():
            vectors = [self.projector(features.flatten(2).mean(2)) for features in (step.extra["bottleneck"], again)]
        first, second = (self.ranks.joined_rows(vector.float()) for vector in vectors)
        return paired_contrast(first, second, self.temperature)

    def pictures(self, step: Step) -> dict[str, torch.Tensor]:
        """Reconstructions, and the weights of their voxels."""
        return {name: step.extra[name] for name in ("reconstruction", "weights") if name in step.extra}

    def after_step(self, step: Step) -> None:
        if "running_dice" not in self._modules:
            return
        labels, annotated = self.annotation(step.labeled_logits, step.target[0])
        classes = None if self.label_manager.has_regions else self.label_manager.num_segmentation_heads
        counts = overlap_counts(self.hard_labels(step.labeled_logits), labels, annotated, classes)
        self.running_dice.update(self.ranks.mean(counts))
