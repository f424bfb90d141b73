"""Learning rates over the phases of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def update_learning_rates(trainer: SemiSupervisedTrainer) -> None:
    """Sets the learning rates for the place where the training stands.

    Called when an epoch or phase begins, and before each of the first ``warmup_steps`` steps, over which the learning
    rates rise linearly.
    """
    position: float = trainer.current_epoch
    if trainer.restarts_schedule and trainer.pretrain_steps:
        done = trainer.iteration / trainer.pretrain_steps if trainer.pretraining else trainer.progress
        position = done * trainer.num_epochs
    trainer.lr_scheduler.step(position)
    if trainer.iteration < trainer.warmup_steps:
        for group in trainer.optimizer.param_groups:
            group["lr"] *= (trainer.iteration + 1) / trainer.warmup_steps
    factor = trainer.optimizer.param_groups[0]["lr"] / trainer.initial_lr
    for group in (group for optimizer in trainer._optimizers.values() for group in optimizer.param_groups):
        if group.get("scheduled", True):
            group["lr"] = group["initial_lr"] * factor
