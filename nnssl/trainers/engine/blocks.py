"""What methods are built from: networks, teachers, optimizers, noise and losses in the settings of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Literal

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnssl.augmentation import strong
from nnssl.errors import UserError
from nnssl.losses.labels import (
    class_cross_entropy,
    most_likely_classes,
    most_likely_regions,
    region_cross_entropy,
)
from nnssl.losses.uncertainty import class_confidence, region_confidence
from nnssl.networks.channel_dropout import dropout_factors
from nnssl.networks.ema import EMATeacher
from nnssl.networks.features import FeatureTap, with_deterministic_pooling
from nnssl.networks.memory_format import set_memory_format
from nnssl.networks.micro_batch import in_parts
from nnssl.networks.unwrap import set_deep_supervision, unwrap
from nnssl.trainers.engine.checkpoint import load_pretrained
from nnssl.trainers.engine.distributed import Ranks
from nnssl.trainers.engine.modules import parameters_of
from nnssl.trainers.engine.precision import Precision
from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.engine.shared_loss import dice_and_cross_entropy


class BuildingBlocks(nnUNetTrainer):
    """The part of ``SemiSupervisedTrainer`` that methods call and none overrides."""

    network: nn.Module
    optimizer_name: Literal["SGD", "AdamW"]
    momentum: float
    nesterov: bool
    ranks: Ranks
    settings: RunSettings
    precision: Precision
    gradient_clipping: float
    segmentation_dice_weight: float
    memory_format: torch.memory_format

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Softmax over classes, or sigmoid where labels are overlapping regions; shape is kept."""
        return logits.sigmoid() if self.label_manager.has_regions else logits.softmax(1)

    def heads(self, network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
        """Float32 logits of ``network`` in this run's precision and micro-batches, full resolution first."""
        return self.heads_and_features(network, images)[0]

    def heads_and_features(
        self, network: nn.Module, images: torch.Tensor, *taps: FeatureTap
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`heads`, and the output of the layers of ``network`` that each of ``taps`` is at, in this run's precision."""

        def outputs(part: torch.Tensor) -> list[torch.Tensor]:
            with self.precision.autocast(), ExitStack() as stack:
                for tap in taps:
                    stack.enter_context(tap.open())
                output = network(part.contiguous(memory_format=self.memory_format))
                features = [tap.output for tap in taps]
            heads = output if isinstance(output, (list, tuple)) else [output]
            return [*features, *(head.float() for head in heads)]

        tensors = in_parts(outputs, images, self.settings.micro_batch)
        return tensors[len(taps) :], tensors[: len(taps)]

    def segmentation_loss(self, heads: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
        """nnU-Net's loss of logits against a reference, both one tensor per head, full resolution first."""
        return self.loss(heads, target) if self.enable_deep_supervision else self.loss(heads[0], target[0])

    def hard_labels(self, logits: torch.Tensor) -> torch.Tensor:
        """Most likely classes ``(N, 1, *S)``, or regions ``(N, R, *S)`` as booleans; no gradient."""
        return most_likely_regions(logits) if self.label_manager.has_regions else most_likely_classes(logits)

    def confidence(self, logits: torch.Tensor) -> torch.Tensor:
        """How sure a prediction is, ``(N, 1, *S)``, from 0 (all classes are equally likely) to 1."""
        measure = region_confidence if self.label_manager.has_regions else class_confidence
        return measure(self.probabilities(logits))

    def cross_entropy(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None = None,
        class_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean over annotated voxels of the negative log-likelihood of classes or regions, 0 if there are none.

        Args:
            logits: ``(N, K, *S)``.
            target: hard labels as from `hard_labels`, or a reference of the labeled stream ``(N, C, *S)``.
            weight: ``(N, 1, *S)`` or what broadcasts to it, for a weighted mean.
            class_weights: ``(K,)``, factors of the log-likelihoods; what the mean is divided by does not change.
        """
        likelihood, annotated = self._likelihood(logits, target, class_weights)
        if annotated is not None:
            weight = annotated.to(logits.dtype) if weight is None else weight * annotated
        return likelihood.mean() if weight is None else self.masked_mean(likelihood, weight)

    def masked_mean(self, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Mean of values ``(N, C, *S)`` weighted by a mask that broadcasts to them; 0 where the mask is empty.

        Where ranks share the batch, the mean of their results is the mean over the global batch.
        """
        weight = mask.to(values.dtype).expand_as(values)
        # every rank divides by the same area
        return (values * weight).sum() / self.ranks.mean(weight.sum()).clamp_min(1e-8)

    @property
    def segmentation_weights(self) -> tuple[float, float]:
        """Of the Dice and of the cross entropy in nnU-Net's loss; their sum is nnU-Net's, so that terms on unlabeled
        patches weigh as much beside it."""
        share = self.segmentation_dice_weight / (1 + self.segmentation_dice_weight)
        return 2 * share, 2 * (1 - share)

    def masked_segmentation_loss(
        self, heads: list[torch.Tensor], target: list[torch.Tensor], mask: list[torch.Tensor]
    ) -> torch.Tensor:
        """nnU-Net's Dice and cross entropy, with its weights, on part of the voxels.

        The cross entropy is a mean over the voxels of each patch, then over the patches, so that every patch weighs the
        same however much of it is chosen; the Dice is nnU-Net's with a ``loss_mask``.

        Args:
            heads: logits ``(N, K, *S)`` per head, full resolution first.
            target: as for `cross_entropy`, one tensor per head.
            mask: ``(N, 1, *S)`` boolean per head, True where the target counts.
        """

        of_dice, of_ce = self.segmentation_weights

        def of_head(logits: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            labels, annotated = self.annotation(logits, target)
            inside = (mask if annotated is None else mask & annotated).to(logits.dtype)
            area = inside.sum(dim=tuple(range(1, inside.ndim)), keepdim=True)
            of_classes = getattr(dice_and_cross_entropy(self.loss).ce, "weight", None)
            cross_entropy = self.cross_entropy(logits, target, inside / area.clamp_min(1), of_classes)
            return of_ce * cross_entropy + of_dice * self.dice_loss(logits, labels, inside)

        return self.over_heads(of_head, heads, target, mask)

    def dice_loss(self, logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """nnU-Net's negative soft Dice of one head against hard labels, on the voxels of a mask ``(N, 1, *S)``."""
        return dice_and_cross_entropy(self.loss).dc(logits, labels, loss_mask=mask)

    def _likelihood(
        self, logits: torch.Tensor, target: torch.Tensor, class_weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cross entropy of voxels, and which of them are annotated (None: all)."""
        labels, annotated = self.annotation(logits, target)
        loss = region_cross_entropy if self.label_manager.has_regions else class_cross_entropy
        likelihood = loss(logits, labels)
        return likelihood if class_weights is None else likelihood * class_weights[labels.long()], annotated

    def annotation(self, logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Classes or regions of a reference, without its ignore label, and which voxels are annotated (None: all)."""
        if self.label_manager.has_regions:
            regions = logits.shape[1]
            ignored = target[:, regions:] if target.shape[1] > regions else None
            return target[:, :regions], None if ignored is None else ~ignored.bool()
        if self.label_manager.ignore_label is None:
            return target, None
        annotated = target != self.label_manager.ignore_label
        return target * annotated, annotated

    def over_heads(
        self, loss: Callable[..., torch.Tensor], heads: list[torch.Tensor], *others: list[torch.Tensor]
    ) -> torch.Tensor:
        """``loss(head, *others of that head)``, summed over heads with nnU-Net's weights of deep supervision."""
        if not self.enable_deep_supervision:
            return loss(heads[0], *(other[0] for other in others))
        return DeepSupervisionWrapper(loss, self.loss.weight_factors)(heads, *others)

    def new_network(self, build: Callable[..., nn.Module] | None = None) -> nn.Module:
        """Another network of the plan with weights of its own, on the device and in this run's memory format.

        ``build`` takes the place, and the arguments, of ``build_network_architecture``.
        """
        network = (build or self.build_network_architecture)(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        ).to(self.device)
        if self.settings.deterministic:
            with_deterministic_pooling(network)
        set_memory_format(network, self.memory_format)
        if self._do_i_compile():
            network.compile()
        return network

    def new_pretrained_network(self) -> nn.Module:
        """`new_network` with the pretrained weights of the run, if it was given any; segmentation heads keep theirs."""
        network = self.new_network()
        if self.settings.pretrained_weights is not None:
            load_pretrained(unwrap(network), self.settings.pretrained_weights)
        return network

    def new_teacher(self) -> EMATeacher:
        """Copy of the student that follows it by averaging and predicts at full resolution only."""
        teacher = EMATeacher(unwrap(self.network))
        set_deep_supervision(teacher.network, False)
        if self._do_i_compile():
            teacher.network.compile()
        return teacher

    def new_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """An optimizer with the settings of this run for ``parameters``."""
        if self.optimizer_name == "AdamW":
            return torch.optim.AdamW(parameters, self.initial_lr, weight_decay=self.weight_decay)
        if not 0 <= self.momentum < 1 or (self.nesterov and not self.momentum):
            raise UserError(
                "momentum must be at least 0 and below 1, and above 0 with nesterov",
                found=f"momentum={self.momentum}, nesterov={self.nesterov}",
                fix="--set momentum=0.99, as in nnU-Net",
            )
        return torch.optim.SGD(
            parameters, self.initial_lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov
        )

    def backward(self, loss: torch.Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """Adds to the gradients of the optimizers' parameters, which are then the mean over ranks, not scaled."""
        scaler = self.grad_scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        for optimizer in optimizers:
            self.ranks.average_gradients(parameters_of(optimizer))
            if scaler is not None:
                scaler.unscale_(optimizer)

    def update(self, *optimizers: torch.optim.Optimizer) -> None:
        """Clips the gradients and steps; to be called after `backward`."""
        scaler = self.grad_scaler
        for optimizer in optimizers:
            nn.utils.clip_grad_norm_(parameters_of(optimizer), self.gradient_clipping)
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()

    def randn_like(self, patches: torch.Tensor) -> torch.Tensor:
        """Standard normal noise of the shape ``(B, ...)`` of patches, the same for any number of ranks."""
        shape = (len(patches) * self.ranks.size, *patches.shape[1:])
        return self.ranks.own_rows(torch.randn(shape, dtype=patches.dtype, device=patches.device))

    def uniform(self, patches: int, *shape: int) -> torch.Tensor:
        """Numbers uniform in [0, 1) ``(patches, *shape)``, the same for any number of ranks."""
        return self.ranks.own_rows(torch.rand((patches * self.ranks.size, *shape), device=self.device))

    def strong_view(self, images: torch.Tensor) -> torch.Tensor:
        """Patches ``(B, C, *P)`` with strong changes of intensity, see `nnssl.augmentation.strong`.

        Where normalization keeps the outside of the body at zero, it stays at zero.
        """
        numbers = self.uniform(*images.shape[:2], strong.NUMBERS).to(images.dtype)
        view = strong.strong_view(images, numbers, self.randn_like(images))
        masked = any(self.configuration_manager.use_mask_for_norm or ())
        return torch.where(images == 0, images, view) if masked else view

    def drop_channels(self, features: torch.Tensor, rate: float) -> torch.Tensor:
        """Channel dropout of patches' features ``(B, C, *S)``, the same for any number of ranks."""
        if rate == 0:
            return features
        factors = dropout_factors(self.uniform(*features.shape[:2]), rate).to(features.dtype)
        return features * factors.view(*factors.shape, *[1] * (features.ndim - 2))
