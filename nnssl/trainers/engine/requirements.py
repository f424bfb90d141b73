"""What a method needs of data and plan, checked before the first step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nnssl.errors import UserError
from nnssl.trainers.engine.cascade import check_first_stage

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


class Unsupported(UserError, NotImplementedError):
    """A method cannot do what the data or the plan asks for."""


def check_requirements(trainer: SemiSupervisedTrainer) -> None:
    """Raises `Unsupported` or ``UserError`` if the method cannot be trained on this plan and split."""
    name = type(trainer).__name__
    dimensions = len(trainer.configuration_manager.patch_size)
    unsupported = {
        f"{dimensions}D configurations": dimensions not in trainer.dimensions,
        "region-based labels": trainer.label_manager.has_regions and not trainer.supports_regions,
        "an ignore label": trainer.label_manager.has_ignore_label and not trainer.supports_ignore_label,
        "the second stage of a cascade": trainer.is_cascaded and not trainer.supports_cascade,
    }
    for what, asked_for in unsupported.items():
        if asked_for:
            raise Unsupported(
                f"{name} does not support {what}",
                where=f"configuration {trainer.configuration_name} of {trainer.plans_manager.dataset_name}",
                fix="choose another configuration, or a trainer that does (nnssl_trainers lists what each can do)",
            )
    _check_common_settings(trainer)
    _check_atlas_augmentation(trainer)
    trainer.check_settings()
    patches = trainer.labeled_batch_size
    if patches is None:
        patches = trainer.configuration_manager.batch_size
    if patches < trainer.min_labeled_patches:
        raise UserError(
            f"{name} needs at least {trainer.min_labeled_patches} labeled patches per step",
            found=patches,
            fix=f"--set labeled_batch_size={trainer.min_labeled_patches}",
        )
    check_first_stage(trainer)
    split = trainer.split()
    counts = [("labeled", len(split.train), trainer.min_labeled)]
    if trainer.uses_unlabeled:
        counts.append(("unlabeled", len(split.unlabeled), trainer.min_unlabeled))
    for kind, found, needed in counts:
        if found < needed:
            raise UserError(
                f"{name} needs at least {needed} {kind} case{'s' if needed > 1 else ''}",
                where=f"fold {trainer.fold} of {trainer.plans_manager.dataset_name}",
                found=found,
                fix="put scans without labels into imagesUn and run nnssl_plan_and_preprocess again, or train with "
                "Supervised"
                if kind == "unlabeled"
                else "label more cases, or train fold all",
            )


def check_value(trainer: SemiSupervisedTrainer, name: str, usable: bool, expected: str) -> None:
    """Raises ``UserError`` unless the value of a hyper-parameter is usable; methods call it in `check_settings`."""
    if not usable:
        raise UserError(
            f"unusable value of hyper-parameter {name!r} of {type(trainer).__name__}",
            expected=expected,
            found=getattr(trainer, name),
            fix=f"--set {name}={getattr(type(trainer), name)}",
        )


def check_weights(trainer: SemiSupervisedTrainer, *names: str) -> None:
    """`check_value` of weights of losses, strengths of noise and the like: finite numbers of 0 or more."""
    for name in names:
        check_value(trainer, name, 0 <= getattr(trainer, name) < math.inf, "0 or more")


def _check_common_settings(trainer: SemiSupervisedTrainer) -> None:
    for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch"):
        check_value(trainer, name, getattr(trainer, name) >= 1, "at least 1")
    for name in ("least_class_share", "pretrain_share", "momentum"):
        check_value(trainer, name, 0 <= getattr(trainer, name) < 1, "0 to below 1")
    check_value(trainer, "initial_lr", 0 < trainer.initial_lr < math.inf, "above 0")
    check_value(trainer, "gradient_clipping", trainer.gradient_clipping > 0, "above 0")
    check_value(trainer, "segmentation_dice_weight", 0 < trainer.segmentation_dice_weight < math.inf, "above 0")
    check_weights(trainer, "weight_decay", "warmup_steps", "lr_decay_power")
    power, regions = trainer.rare_class_power, trainer.label_manager.has_regions
    expected = "0 where labels are regions" if regions else "0 to 1"
    check_value(trainer, "rare_class_power", 0 <= power <= (0 if regions else 1), expected)
    share = trainer.oversample_foreground_percent
    check_value(trainer, "oversample_foreground_percent", 0 <= share <= 1, "a share, 0 to 1")
    axes, dimensions = trainer.mirror_axes or (), len(trainer.configuration_manager.patch_size)
    usable = len(set(axes)) == len(axes) and set(axes) <= set(range(dimensions))
    check_value(trainer, "mirror_axes", usable, f"different axes of 0 to {dimensions - 1}")
    check_value(trainer, "rotation_degrees", 0 <= (trainer.rotation_degrees or 0) <= 180, "0 to 180")


def _check_atlas_augmentation(trainer: SemiSupervisedTrainer) -> None:
    check_value(trainer, "switch_probability", 0 <= trainer.switch_probability <= 1, "0 to 1")
    boxes, edges = trainer.switch_boxes, trainer.switch_edges
    usable = len(boxes) == 2 and 1 <= boxes[0] <= boxes[1]
    check_value(trainer, "switch_boxes", usable, "two numbers from 1 on, the smaller one first")
    usable = len(edges) == 2 and 0 < edges[0] <= edges[1] <= 1
    check_value(trainer, "switch_edges", usable, "two shares above 0 and at most 1, the smaller one first")
    labeled = len(trainer.split().train)
    if labeled < 2 and trainer.atlas_augmentation != "none":
        raise UserError(
            "the regional switch needs at least 2 labeled cases",
            where=f"fold {trainer.fold} of {trainer.plans_manager.dataset_name}",
            found=labeled,
            fix="label more cases, train fold all, or train with --atlas-augmentation none",
        )
