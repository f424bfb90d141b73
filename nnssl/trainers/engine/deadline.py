"""Trainings that have to end at a given time."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def keep_deadline(trainer: SemiSupervisedTrainer) -> bool:
    """At the end of an epoch of the last phase: shortens a training that would not end before its deadline.

    Learning rates and ramps go on as in a training of the new length. Returns whether it was shortened.
    """
    if trainer.deadline is None or any(start > trainer.iteration for start in phase_boundaries(trainer)):
        return False
    epochs = trainer.ranks.from_main(lambda: _epochs_in_time(trainer))
    if epochs == trainer.num_epochs:
        return False
    trainer.num_epochs = trainer.lr_scheduler.max_steps = epochs
    return True


def _epochs_in_time(trainer: SemiSupervisedTrainer) -> int:
    assert trainer.deadline is not None
    times = [trainer.logger.get_value(f"epoch_{name}_timestamps", step=-1) for name in ("start", "end")]
    left = max(0, math.floor((trainer.deadline - time.time()) / (times[1] - times[0])))
    return min(trainer.num_epochs, trainer.current_epoch + 1 + left)


def phase_boundaries(trainer: SemiSupervisedTrainer) -> list[int]:
    """First steps of the phases of a training."""
    return sorted({0, trainer.pretrain_steps, *trainer.phase_starts})
