"""Trainings that have to end at a given time."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl.trainers.engine.record import RECORD
from nnssl.utils.files import read_json, write_json

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def phase_boundaries(trainer: SemiSupervisedTrainer) -> list[int]:
    """First steps of the phases of a training."""
    return sorted({0, trainer.pretrain_steps, *trainer.phase_starts})


def keep_deadline(trainer: SemiSupervisedTrainer) -> bool:
    """At the end of an epoch of the last phase: shortens a training that would not end before its deadline.

    Where the phases begin stays as it was planned; learning rates and ramps of the last one go on as in a phase of the
    new length. Returns whether the training was shortened.
    """
    began = phase_boundaries(trainer)[-1]
    if trainer.deadline is None or began >= trainer.iteration:
        return False
    epochs = trainer.ranks.from_main(lambda: _epochs_in_time(trainer, began))
    if epochs == trainer.num_epochs:
        return False
    trainer.settings.planned_epochs = trainer.settings.planned_epochs or trainer.num_epochs
    trainer.num_epochs = trainer.lr_scheduler.max_steps = epochs
    if trainer.ranks.is_main:
        _record(trainer)
    return True


def _epochs_in_time(trainer: SemiSupervisedTrainer, began: int) -> int:
    """Epochs of the training for which there is time, by those of the phase that are done.

    The first one does not count: workers start in it, networks are compiled, whole cases were predicted before.
    """
    assert trainer.deadline is not None
    first = began // trainer.num_iterations_per_epoch + 1
    starts, ends = (trainer.logger.get_value(f"epoch_{name}_timestamps", step=None) for name in ("start", "end"))
    seconds = [end - start for start, end in zip(starts[first:], ends[first:], strict=True)]
    if not seconds:
        return trainer.num_epochs
    left = max(0, math.floor((trainer.deadline - _now()) / statistics.median(seconds)))
    return min(trainer.num_epochs, trainer.current_epoch + 1 + left)


def _record(trainer: SemiSupervisedTrainer) -> None:
    path = Path(trainer.output_folder, RECORD)
    if path.is_file():
        record = read_json(path)
        record["hyperparameters"]["num_epochs"] = trainer.num_epochs
        record["settings"] = trainer.settings.as_dict()
        write_json(record, path)


def _now() -> float:
    return time.time()
