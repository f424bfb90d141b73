"""How a trainer is put together: network, optimizer, loss and modules in the settings of a run."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from nnssl.losses.labels import WeightedCrossEntropy
from nnssl.networks.features import with_deterministic_pooling
from nnssl.networks.unwrap import set_deep_supervision, unwrap
from nnssl.trainers.engine import checkpoint
from nnssl.trainers.engine.atlas import settle_correspondence
from nnssl.trainers.engine.blocks import BuildingBlocks
from nnssl.trainers.engine.class_balance import weigh_classes
from nnssl.trainers.engine.distributed import synchronize_batch_norms
from nnssl.trainers.engine.memory_format import check_memory_format, choose_memory_format
from nnssl.trainers.engine.modules import attach_modules
from nnssl.trainers.engine.precision import choose_precision
from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.engine.shared_loss import dice_and_cross_entropy, share_loss
from nnssl.trainers.engine.state import make_deterministic, seed_everything

NNUNET_SCALES = (0.85, 1.25)
"""Scales that nnU-Net's size of the patch before the spatial transforms allows for."""


class SetUp(BuildingBlocks):
    """The part of ``SemiSupervisedTrainer`` that stands in the place of nnU-Net's set-up."""

    settings: RunSettings
    lr_decay_power: float
    mirror_axes: tuple[int, ...] | None
    rotation_degrees: float | None
    labeled_batch_size: int | None
    _modules: dict[str, nn.Module]

    def initialize(self) -> None:
        """Builds network, optimizer, loss and the modules of the method, seeded, on the device, alike on all ranks."""
        self.ranks.connect(self.device)
        if self.settings.seed is None:
            self.settings.seed = self.ranks.from_main(lambda: int.from_bytes(os.urandom(4), "little"))
        planned_axes = self.configuration_manager.configuration.get("semi_supervised", {}).get("mirror_axes")
        if self.mirror_axes is None and planned_axes is not None:
            # kept like a hyper-parameter, so that a continued training mirrors alike if it is planned anew meanwhile
            self.mirror_axes = tuple(planned_axes)
        settle_correspondence(self)
        if self.settings.deterministic:
            make_deterministic()
        elif self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        check_memory_format(self.settings.memory_format)
        self.precision = choose_precision(self.device, self.settings.precision)
        seed_everything(self.settings.seed)
        super().initialize()
        if self.settings.deterministic:
            with_deterministic_pooling(unwrap(self.network))
        weigh_classes(self)
        self.network = synchronize_batch_norms(self.network, self.ranks, self.device)
        self.grad_scaler = self.precision.grad_scaler()
        if self.settings.pretrained_weights is not None:
            checkpoint.load_pretrained(unwrap(self.network), self.settings.pretrained_weights)
        choose_memory_format(self)
        attach_modules(self)
        self.ranks.copy_from_main([self.network, *self._modules.values()])

    def _set_batch_size_and_oversample(self) -> None:
        patches = self.labeled_batch_size
        if patches is None:
            patches = self.configuration_manager.batch_size
        self.batch_size = self.ranks.even_share(patches, "labeled")

    def _build_loss(self) -> nn.Module:
        loss = super()._build_loss()
        inner = dice_and_cross_entropy(loss)
        inner.weight_dice, inner.weight_ce = self.segmentation_weights
        if self.settings.deterministic and not self.label_manager.has_regions:
            # equal to nnU-Net's, and possible on CUDA
            inner.ce = WeightedCrossEntropy(ignore_index=inner.ce.ignore_index)
        return share_loss(loss, self.ranks, self.label_manager.ignore_label)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        optimizer = self.new_optimizer(self.network.parameters())
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, self.lr_decay_power)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, tuple[int, ...]]:
        """nnU-Net's geometry of augmentation, with `mirror_axes` and `rotation_degrees` where they are set."""
        rotation, dummy_2d, initial_patch_size, axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if self.mirror_axes is not None:
            axes = self.mirror_axes
            # nnU-Net's predictor takes None for 'no mirroring' and fails on an empty tuple
            self.inference_allowed_mirroring_axes = axes or None
        if self.rotation_degrees is not None:
            angle = math.radians(self.rotation_degrees)
            rotation, patch_size = (-angle, angle), self.configuration_manager.patch_size
            initial_patch_size = get_patch_size(patch_size, *3 * (rotation,), NNUNET_SCALES)
            if dummy_2d:
                initial_patch_size[0] = patch_size[0]
        return rotation, dummy_2d, initial_patch_size, axes

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        set_deep_supervision(self.network, enabled)

    def print_to_log_file(self, *args: Any, **kwargs: Any) -> None:
        if self.ranks.is_main:
            super().print_to_log_file(*args, **kwargs)

    def print_plans(self) -> None:
        """Writes the plan to the log file; on the console it would bury everything else."""
        self.print_to_log_file(self.configuration_manager, also_print_to_console=False)

    def plot_network_architecture(self) -> None:
        """Nothing: nnU-Net's plot needs a library that no longer works."""
