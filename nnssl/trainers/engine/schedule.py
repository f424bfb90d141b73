"""Learning rates over the phases of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def update_learning_rates(trainer: SemiSupervisedTrainer) -> None:
    """Sets the learning rates for the place where the training stands; called when an epoch or phase begins."""
    position: float = trainer.current_epoch
    if trainer.restarts_schedule and trainer.pretrain_steps:
        done = trainer.iteration / trainer.pretrain_steps if trainer.pretraining else trainer.progress
        position = done * trainer.num_epochs
    trainer.lr_scheduler.step(position)
    factor = trainer.optimizer.param_groups[0]["lr"] / trainer.initial_lr
    for group in (group for optimizer in trainer._optimizers.values() for group in optimizer.param_groups):
        if group.get("scheduled", True):
            group["lr"] = group["initial_lr"] * factor
