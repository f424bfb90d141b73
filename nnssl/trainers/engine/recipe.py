"""Optimizer and learning rate by the length of a training (docs/few_labels.md)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

SHORT_BELOW = 10_000
"""Steps below which ``recipe=auto`` is the short one."""
SHORT: dict[str, Any] = {"optimizer_name": "AdamW", "initial_lr": 2e-3, "weight_decay": 0.01}
SEVERAL_CLASSES = 2
"""Foreground classes from which on the short recipe is `SHORT_SEVERAL_CLASSES`."""
SHORT_SEVERAL_CLASSES: dict[str, Any] = SHORT | {
    "initial_lr": 1e-2,
    "warmup_steps": 20,
    "segmentation_dice_weight": 16.0,
    "rare_class_power": 0.5,
}
"""In the beginning the gradient of a mean Dice over classes is far below that of the cross entropy, of which small
classes have a tiny share: with `SHORT` they are learned late. A single class is learned better with that."""


def apply_recipe(trainer: SemiSupervisedTrainer, chosen: Collection[str]) -> None:
    """Decides on the recipe of a run and sets the hyper-parameters that belong to it.

    Those that the user has chosen stay, and those for which the method has a value of its own. Who chooses SGD, or what
    only SGD has, or optimizer, learning rate and weight decay at once, gets nnU-Net's values for the rest.

    Args:
        trainer: with its budget set.
        chosen: names of the hyper-parameters that the user has set.
    """
    if trainer.recipe == "auto":
        of_sgd = {"momentum", "nesterov"}.intersection(chosen)
        sgd = of_sgd or ("optimizer_name" in chosen and trainer.optimizer_name == "SGD")
        own = sgd or SHORT.keys() <= set(chosen)
        trainer.recipe = "nnunet" if own or total_steps(trainer) >= SHORT_BELOW else "short"
    if trainer.recipe == "short":
        manager = trainer.label_manager
        several = not manager.has_regions and len(manager.foreground_labels) >= SEVERAL_CLASSES
        for name, value in (SHORT_SEVERAL_CLASSES if several and trainer.learns_by_dice else SHORT).items():
            if name not in chosen and not _has_its_own(type(trainer), name):
                setattr(trainer, name, value)


def total_steps(trainer: SemiSupervisedTrainer) -> int:
    """Steps of the whole training."""
    return trainer.num_epochs * trainer.num_iterations_per_epoch


def describe_recipe(trainer: SemiSupervisedTrainer) -> str:
    """The recipe and what it stands for, in one line of the log."""
    optimizer = f"{trainer.optimizer_name}, learning rate {trainer.initial_lr:g}, weight decay {trainer.weight_decay:g}"
    if trainer.warmup_steps:
        optimizer += f", {trainer.warmup_steps} steps of warm-up"
    if trainer.segmentation_dice_weight != 1:
        optimizer += f", Dice weighs {trainer.segmentation_dice_weight:g} times the cross entropy"
    if trainer.rare_class_power:
        optimizer += f", in which classes weigh their share of the voxels to the power of -{trainer.rare_class_power:g}"
    return f"recipe for {total_steps(trainer):,} steps: {trainer.recipe} ({optimizer}); --set recipe=nnunet|short"


def _has_its_own(trainer: type, name: str) -> bool:
    from nnssl.trainers.base import SemiSupervisedTrainer

    return getattr(trainer, name) != getattr(SemiSupervisedTrainer, name)
