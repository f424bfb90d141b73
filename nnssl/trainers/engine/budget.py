"""How many steps fit into a number of minutes: measured on the machine, data and method of the training."""

from __future__ import annotations

import contextlib
import gc
import io
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnssl.dataloading.cases import NamedErrors
from nnssl.dataloading.streams import PREFETCHED_BATCHES
from nnssl.errors import UserError
from nnssl.trainers.engine.deadline import Deadline, phase_boundaries
from nnssl.trainers.engine.device_errors import device_errors
from nnssl.trainers.engine.distributed import current_ranks
from nnssl.trainers.engine.pipelines import unlabeled_images, worker_counts
from nnssl.trainers.engine.pseudo_labeling import pseudo_label
from nnssl.trainers.engine.recipe import total_steps
from nnssl.trainers.engine.request import TrainingRequest, overrides_of, trainer_class_of
from nnssl.trainers.engine.trial import trial
from nnssl.trainers.engine.validation import case_image, predict_logits, predictor_of, validation_cases

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

RESERVE = 0.1
"""Share of the minutes that is left free, since the speed of machines varies."""
STEPS_PER_EPOCH = 250
EPOCHS = 20
"""At least, so that there are curves to be looked at: epochs of a short training have fewer steps."""
FEWEST_STEPS = 100
VALIDATION_SHARE = 5
"""Steps per batch of the online validation, nnU-Net's proportion."""

_WARM_UP, _MEASURED = 2, 5
# reading, resampling to the grid of the scan and writing, beside the prediction of a case: a rough allowance; between
# the phases predictions stay on the grid of the network
_EXPORT = 1.5
_PREDICTED_AGAIN = 5.0
"""Seconds; a case that takes longer is predicted once for its timing: a second time would cost more than it tells."""


@dataclass(frozen=True)
class Costs:
    """What a training costs, in seconds.

    Attributes:
        step: a step with its share of the online validation, on average over the phases of the training.
        start: until the first step is made, streams and compilation included.
        between: predictions of whole cases between the phases.
        after: those after the last phase, the validation.
    """

    step: float
    start: float
    between: float = 0.0
    after: float = 0.0

    @property
    def cases(self) -> float:
        """Predictions of whole cases."""
        return self.between + self.after

    def steps_within(self, seconds: float) -> int:
        """Steps for which there is time; 0 or less if there is for none."""
        return math.floor((seconds - self.start - self.cases) / self.step)

    def steps_of(self, request: TrainingRequest) -> int:
        """Steps for which there is time in what is left of the minutes of a request, a reserve left out; at least 0."""
        assert request.minutes is not None
        return max(0, self.steps_within(60 * request.minutes * (1 - RESERVE) - (time.time() - request.asked_at)))

    def seconds_for(self, steps: int) -> float:
        return self.start + self.cases + steps * self.step


@dataclass(frozen=True)
class Budget:
    """Length of a training, in words how it was found, and when its last step is due and planned (``time.time``)."""

    epochs: int
    iterations_per_epoch: int
    explanation: str
    due: float
    planned: float

    @property
    def steps(self) -> int:
        return self.epochs * self.iterations_per_epoch

    @property
    def deadline(self) -> Deadline:
        return Deadline(self.due, self.planned)


def plan_budget(
    costs: Costs, minutes: float, *, asked_at: float, now: float, iterations_per_epoch: int | None = None
) -> Budget:
    """The longest training that ends within ``minutes``, a reserve of 10 % left out.

    Args:
        costs: of the training.
        minutes: that the user gives.
        asked_at: when they began, as ``time.time`` counts.
        now: the present moment.
        iterations_per_epoch: if the user has chosen it.

    Raises:
        UserError: if there is no time for 100 steps, or for one epoch.
    """
    spent = now - asked_at
    found = costs.steps_within(60 * minutes * (1 - RESERVE) - spent)
    steps_per_epoch = iterations_per_epoch or max(1, min(STEPS_PER_EPOCH, found // EPOCHS))
    fewest = max(FEWEST_STEPS, steps_per_epoch)
    facts = f"{_seconds(costs.step)} per step"
    if costs.cases:
        facts += f", {_seconds(costs.cases)} for predictions of whole cases"
    if found < fewest:
        needed = (costs.seconds_for(fewest) + spent) / (60 * (1 - RESERVE))
        raise UserError(
            f"{minutes:g} minutes are too few for {fewest} steps of this training",
            found=facts,
            fix=f"--minutes {math.ceil(needed)} or more, or a method that costs less (README, table of methods)",
        )
    epochs, due = found // steps_per_epoch, asked_at + 60 * minutes - costs.after
    return Budget(
        epochs,
        steps_per_epoch,
        f"{minutes:g} minutes: {facts}, {RESERVE:.0%} kept in reserve: {epochs} epochs of {steps_per_epoch} steps",
        due,
        due - 60 * minutes * RESERVE,
    )


def budget_of(request: TrainingRequest, device: torch.device) -> Budget:
    """The longest training of the requested method that ends within the requested minutes, the same on all ranks."""
    ranks, minutes = current_ranks(), request.minutes
    assert minutes is not None
    costs = costs_of(request, device)
    chosen = overrides_of(request, trainer_class_of(request)).get("num_iterations_per_epoch")

    def plan() -> Budget:
        return plan_budget(costs, minutes, asked_at=request.asked_at, now=time.time(), iterations_per_epoch=chosen)

    return Budget(*ranks.from_main(lambda: astuple(plan())))


def costs_of(request: TrainingRequest, device: torch.device) -> Costs:
    """What the requested training costs, measured on a trial of it. All ranks have to ask together."""
    minutes = request.minutes
    assert minutes is not None
    print(f"Timing steps of {request.trainer} for a training of {minutes:g} minutes ...", flush=True)
    with contextlib.redirect_stdout(io.StringIO()), trial(request, device) as trainer:
        end = request.asked_at + 60 * minutes
        trainer.deadline = Deadline(end, end - 60 * minutes * RESERVE)
        with device_errors(trainer):
            costs = measure_costs(trainer)
    del trainer
    gc.collect()
    # the next trainer connects them anew
    current_ranks().disconnect()
    return costs


def measure_costs(trainer: SemiSupervisedTrainer) -> Costs:
    """Takes a few steps of each phase of a training that is not to be kept.

    All ranks of a training have to measure together. Later phases of a method that works on pseudo-labels are measured
    with labels in their place.

    Args:
        trainer: configured, not initialized; it cannot be used afterwards.
    """
    trainer.print_to_log_file = _silent  # type: ignore[method-assign]
    trainer.unlabeled_cases()  # what a method makes once and keeps, as registered labels, is not made again
    began = time.monotonic()
    trainer.on_train_start()
    try:
        trainer.network.train()
        total, starts = total_steps(trainer), phase_boundaries(trainer)
        ready, step = 0.0, 0.0
        for start, end in zip(starts, [*starts[1:], total], strict=True):
            if start > 0:
                _go_to(trainer, start)
            began += _drain(trainer)
            seconds = _median_seconds(trainer, lambda: _step(trainer))
            step += seconds * (end - start) / total
            ready = ready or time.monotonic() - began - _MEASURED * seconds
        step += _validation_seconds(trainer) / VALIDATION_SHARE
    finally:
        trainer.dataloader_train.close()
        trainer.dataloader_val.close()
    return Costs(step, ready, *_case_seconds(trainer))


def _go_to(trainer: SemiSupervisedTrainer, iteration: int) -> None:
    """Goes on at the first step of a phase, with its streams."""
    trainer.dataloader_train.close()
    trainer.dataloader_val.close()
    trainer.iteration, trainer.current_epoch = iteration, iteration // trainer.num_iterations_per_epoch
    trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()


def _drain(trainer: SemiSupervisedTrainer) -> float:
    """Takes the batches that the workers hold ready, which would hide how fast they are; the seconds it took."""
    next(trainer.dataloader_train)
    began = time.monotonic()
    for _ in range((PREFETCHED_BATCHES + 1) * max(worker_counts(trainer).values())):
        next(trainer.dataloader_train)
    return time.monotonic() - began


def _step(trainer: SemiSupervisedTrainer) -> None:
    batch = next(trainer.dataloader_train)
    if trainer.phase_starts and trainer.iteration >= trainer.phase_starts[0] and trainer.num_unlabeled:
        batch = batch | _stand_ins(trainer, batch)
    trainer.train_step(batch)


def _stand_ins(trainer: SemiSupervisedTrainer, batch: dict[str, Any]) -> dict[str, Any]:
    """Labeled patches in the place of pseudo-labeled ones."""
    rows = [row % len(batch["data"]) for row in range(trainer.num_unlabeled)]
    target = batch["target"]
    pseudo = [head[rows] for head in target] if isinstance(target, list) else target[rows]
    return {"unlabeled": batch["data"][rows], "pseudo_target": pseudo}


def _validation_seconds(trainer: SemiSupervisedTrainer) -> float:
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        return _median_seconds(trainer, lambda: trainer.validation_step(next(trainer.dataloader_val)))


def _case_seconds(trainer: SemiSupervisedTrainer) -> tuple[float, float]:
    """Predictions between the phases and at the end, from that of one case of middle size; ranks share them."""
    split = trainer.split()
    between = len(split.unlabeled) * len(trainer.phase_starts)
    after = 0 if trainer.fold == "all" else len(split.val)
    if not between + after:
        return 0.0, 0.0
    cases, folder = split.val, Path(trainer.preprocessed_dataset_folder)
    if between:
        images = NamedErrors(unlabeled_images(trainer))
        cases, folder = split.unlabeled, Path(images.folder)
    sizes = {case: sum(file.stat().st_size for file in folder.glob(f"{case}.*")) for case in cases}
    middle = sorted(cases, key=lambda case: sizes[case])[len(cases) // 2]

    def seconds(mirroring: bool) -> float:
        predictor = predictor_of(trainer, mirroring)

        def predict() -> None:
            if between:
                pseudo_label(predictor, torch.from_numpy(images.load_case(middle)[0][:]))
            else:
                image, _ = case_image(trainer, validation_cases(trainer, [middle]), middle)
                trainer.label_manager.convert_logits_to_segmentation(predict_logits(predictor, image))

        def timed() -> float:
            began = time.monotonic()
            predict()
            return time.monotonic() - began

        # the first time kernels are chosen and memory is taken
        first = timed()
        each = timed() if trainer.device.type == "cuda" or first < _PREDICTED_AGAIN else first
        return each / trainer.ranks.size

    mirroring = not between or trainer.mirrors_between_phases
    each = seconds(mirroring)
    # validation cases are mirrored
    last = each if mirroring or not after else seconds(True)
    return between * each, _EXPORT * after * last


def _median_seconds(trainer: SemiSupervisedTrainer, function: Callable[[], Any]) -> float:
    times = []
    for _ in range(_WARM_UP + _MEASURED):
        began = time.perf_counter()
        function()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[_WARM_UP:])


def _seconds(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _silent(*args: Any, **kwargs: Any) -> None:
    """Takes the place of the log."""
