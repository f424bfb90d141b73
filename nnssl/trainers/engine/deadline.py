"""Trainings that have to end at a given time, and use it."""

from __future__ import annotations

import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl.trainers.engine.record import RECORD
from nnssl.trainers.engine.schedule import schedule_starts
from nnssl.utils.files import read_json, write_json

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


RESERVE = 0.1
"""Share of the time that is left free where a length is planned, since the speed of machines varies."""
LENGTHENED_AFTER = 0.2
"""Share of the last phase after which its speed is known well enough."""


def phase_boundaries(trainer: SemiSupervisedTrainer) -> list[int]:
    """First steps of the phases of a training."""
    return sorted({0, trainer.pretrain_steps, *trainer.phase_starts})


def keep_deadline(trainer: SemiSupervisedTrainer) -> bool:
    """At the end of an epoch of the last phase: shortens a training that would not end before its deadline.

    Once, early in it, a training that would end long before is lengthened, unless the learning rate has passed half of
    its schedule. Where the phases begin stays as it was planned; learning rates and ramps of the last one go on
    as in a phase of the new length. Returns whether the length was changed.
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
    done, left = trainer.current_epoch + 1, (trainer.deadline - _now()) / statistics.median(seconds)
    scheduled = max(start for start in schedule_starts(trainer) if start <= began) // trainer.num_iterations_per_epoch
    early = len(seconds) == math.ceil(LENGTHENED_AFTER * (trainer.num_epochs - first))
    if early and trainer.settings.planned_epochs is None and done - scheduled < (trainer.num_epochs - scheduled) / 2:
        longer = done + math.floor((1 - RESERVE) * left)
        if longer > trainer.num_epochs:
            return longer
    return min(trainer.num_epochs, done + max(0, math.floor(left)))


def _record(trainer: SemiSupervisedTrainer) -> None:
    path = Path(trainer.output_folder, RECORD)
    if path.is_file():
        record = read_json(path)
        record["hyperparameters"]["num_epochs"] = trainer.num_epochs
        record["settings"] = trainer.settings.as_dict()
        write_json(record, path)


def _now() -> float:
    return time.time()
