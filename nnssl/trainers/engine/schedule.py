"""Learning rates over the phases of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def schedule_starts(trainer: SemiSupervisedTrainer) -> list[int]:
    """First steps of the schedules of a training: of the first one, and of those that begin with a phase."""
    starts = [0, *trainer.schedule_starts]
    if trainer.restarts_schedule and trainer.pretrain_steps:
        starts.append(trainer.pretrain_steps)
    return starts


def update_learning_rates(trainer: SemiSupervisedTrainer) -> None:
    """Sets the learning rates for the place where the training stands.

    Called when an epoch or phase begins, and before each step if there is a warm-up, over which the rates rise linearly
    from the start of a schedule on, or if they fall in each step.
    """
    position: float = trainer.current_epoch
    starts = schedule_starts(trainer)
    began = max(start for start in starts if start <= trainer.iteration)
    if len(starts) > 1 or trainer.lr_decay_per_step:
        total = trainer.num_epochs * trainer.num_iterations_per_epoch
        ends = min((start for start in starts if start > trainer.iteration), default=total)
        # rates stay the same from the start of an epoch or phase on, also for a training continued in between
        since = max(began, trainer.current_epoch * trainer.num_iterations_per_epoch)
        if trainer.lr_decay_per_step:
            since = trainer.iteration
        # one division at the end: a phase has the very rates of a training of its length
        position = trainer.num_epochs * (since - began) / (ends - began)
    trainer.lr_scheduler.step(position)
    done = trainer.iteration - began
    if done < trainer.warmup_steps:
        for group in trainer.optimizer.param_groups:
            group["lr"] *= (done + 1) / trainer.warmup_steps
    factor = trainer.optimizer.param_groups[0]["lr"] / trainer.initial_lr
    for group in (group for optimizer in trainer._optimizers.values() for group in optimizer.param_groups):
        if group.get("scheduled", True):
            group["lr"] = group["initial_lr"] * factor
