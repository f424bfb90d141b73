"""From a request ('train this method on that data set') to a finished run."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

from nnssl.errors import UserError
from nnssl.inference.models import AUTO
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.auto import with_choice
from nnssl.trainers.engine.budget import budget_of
from nnssl.trainers.engine.distributed import current_ranks, joined, ranks_of_environment
from nnssl.trainers.engine.launch import launch
from nnssl.trainers.engine.loop import BEST, FINAL, LATEST
from nnssl.trainers.engine.preview import FOLDER as PREVIEWS
from nnssl.trainers.engine.record import record_run
from nnssl.trainers.engine.request import (
    TrainingRequest,
    build_trainer,
    check_flags,
    overrides_of,
    prepare_device,
    requested_plan,
    settings_of,
    trainer_class_of,
)
from nnssl.trainers.engine.requirements import check_requirements
from nnssl.utils.lock import only_process
from nnssl.utils.paths import results_folder


def run(request: TrainingRequest) -> None:
    """Trains and validates as requested, in this process, in ``num_gpus`` new ones, or as one of those of torchrun.

    Raises:
        UserError: for anything a user can mend, before the first step wherever possible.
    """
    check_flags(request)
    if request.num_gpus > 1:
        launch(_run_rank, (replace(request, num_gpus=1),), request.num_gpus)
    else:
        with joined(ranks_of_environment()):
            _run_rank(request)


def _run_rank(request: TrainingRequest) -> None:
    ranks = current_ranks()
    device = prepare_device(request.device)
    # the ranks of a training share the locks of the first
    with contextlib.ExitStack() as lock, contextlib.ExitStack() as choosing:
        if request.trainer == AUTO:
            results = results_folder() / requested_plan(request).dataset
            one_at_a_time = only_process(results, "chooses what auto trains", wait=True)
            ranks.from_main(lambda: choosing.enter_context(one_at_a_time), timeout=None)
            request = with_choice(request, device)
        trainer_class = trainer_class_of(request)
        overrides_of(request, trainer_class)  # wrong ones are told before anything is done
        trainer = build_trainer(request, trainer_class, device)
        folder = Path(trainer.output_folder)
        trainer.disable_checkpointing = request.disable_checkpointing
        ranks.from_main(lambda: lock.enter_context(only_process(folder, "trains this run")))
        choosing.close()  # by the lock of this run others see that it is under way
        _train_and_validate(request, trainer)


def _train_and_validate(request: TrainingRequest, trainer: SemiSupervisedTrainer) -> None:
    ranks, folder = trainer.ranks, Path(trainer.output_folder)
    start = ranks.from_main(lambda: _checkpoint_to_load(request, folder))
    if start is not None:
        trainer.load_checkpoint(start)
        # these do not change the result, and a training may go on where there is less memory
        trainer.settings.micro_batch = request.micro_batch or trainer.settings.micro_batch
        trainer.settings.memory_check = not request.disable_memory_check
        if request.preview_every is not None:
            trainer.settings.preview_every = request.preview_every
        if request.minutes is not None or overrides_of(request, type(trainer)):
            trainer.print_to_log_file(
                "--set, --epochs, --iterations-per-epoch, --minutes and --atlas-augmentation are those of the "
                "continued run"
            )
    else:
        if request.minutes is not None:
            budget = budget_of(request, trainer.device)
            trainer.print_to_log_file(budget.explanation)
            trainer.deadline = budget.deadline
            request = replace(request, epochs=budget.epochs, iterations_per_epoch=budget.iterations_per_epoch)
        trainer.configure(overrides_of(request, type(trainer)), settings_of(request))
    if not request.only_validate and trainer.current_epoch < trainer.num_epochs:
        check_requirements(trainer)
        if not trainer.was_initialized:
            trainer.initialize()
        if ranks.is_main:
            if start is None:
                for name in (FINAL, LATEST):
                    (folder / name).unlink(missing_ok=True)
                shutil.rmtree(folder / PREVIEWS, ignore_errors=True)
            record_run(trainer)
        trainer.run_training()
    # the rest is done by each on its own, and takes unequal times
    ranks.disconnect()
    if request.validate_best:
        trainer.load_checkpoint(str(folder / BEST))
    trainer.perform_actual_validation(request.save_probabilities)


def _checkpoint_to_load(request: TrainingRequest, folder: Path) -> str | None:
    existing = [folder / name for name in (FINAL, LATEST) if (folder / name).is_file()]
    if request.only_validate:
        if not (folder / FINAL).is_file():
            raise UserError(
                "the training is not finished, so it cannot be validated", where=folder, fix="train with --c"
            )
        return str(folder / FINAL)
    if request.resume:
        if not existing:
            print(f"There is no checkpoint to continue from in {folder}: starting a new training.")
        return str(existing[0]) if existing else None
    if existing and not request.overwrite:
        raise UserError(
            "this run has been trained before",
            where=existing[0],
            fix="continue it with --c, start again with --overwrite, or keep it by choosing another nnUNet_results",
        )
    return None
