"""Trainings that have to end at a given time, and use it."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl.trainers.engine.record import RECORD
from nnssl.trainers.engine.schedule import schedule_starts
from nnssl.utils.files import read_json, write_json

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


LENGTHENED_AFTER = 0.2
"""Share of the last phase after which its speed is known well enough."""


@dataclass(frozen=True)
class Deadline:
    """When the last step is due, and when it was planned to be made, as ``time.time`` counts."""

    due: float
    planned: float


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
    """Epochs of the training for which there is time, by those of the phase that are done, with what comes between.

    The first one does not count: workers start in it, networks are compiled, whole cases were predicted before.
    """
    assert trainer.deadline is not None
    first, now = began // trainer.num_iterations_per_epoch + 1, _now()
    starts = [*trainer.logger.get_value("epoch_start_timestamps", step=None), now][first:]
    seconds = [end - start for start, end in pairwise(starts)]
    if not seconds:
        return trainer.num_epochs
    done, each = trainer.current_epoch + 1, statistics.median(seconds)
    scheduled = max(start for start in schedule_starts(trainer) if start <= began) // trainer.num_iterations_per_epoch
    early = len(seconds) == math.ceil(LENGTHENED_AFTER * (trainer.num_epochs - first))
    if early and trainer.settings.planned_epochs is None and done - scheduled < (trainer.num_epochs - scheduled) / 2:
        longer = done + math.floor((trainer.deadline.planned - now) / each)
        if longer > trainer.num_epochs:
            return longer
    return min(trainer.num_epochs, done + max(0, math.floor((trainer.deadline.due - now) / each)))


def _record(trainer: SemiSupervisedTrainer) -> None:
    path = Path(trainer.output_folder, RECORD)
    if path.is_file():
        record = read_json(path)
        record["hyperparameters"]["num_epochs"] = trainer.num_epochs
        record["settings"] = trainer.settings.as_dict()
        write_json(record, path)


def _now() -> float:
    return time.time()
