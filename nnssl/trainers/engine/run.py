"""From a request ('train this method on that data set') to a finished run."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from nnssl.errors import UserError
from nnssl.inference.models import AUTO
from nnssl.planners.plans_file import data_differences
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.auto import with_choice
from nnssl.trainers.engine.budget import budget_of
from nnssl.trainers.engine.device_errors import device_errors
from nnssl.trainers.engine.distributed import current_ranks, joined, ranks_of_environment
from nnssl.trainers.engine.launch import launch
from nnssl.trainers.engine.loop import BEST, FINAL, LATEST
from nnssl.trainers.engine.preview import FOLDER as PREVIEWS
from nnssl.trainers.engine.record import RECORD, run_record
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
from nnssl.utils.files import read_json, write_json
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
    if not request.only_validate:
        _refuse_to_replace_plans(trainer)
    if start is not None:
        # these do not change the result, and a training may go on where there is less memory
        trainer.settings.micro_batch = request.micro_batch or trainer.settings.micro_batch
        trainer.settings.memory_check = not request.disable_memory_check
        if request.preview_every is not None:
            trainer.settings.preview_every = request.preview_every
        ignored = _ignored_flags(request, trainer)
        if ignored:
            trainer.print_to_log_file(f"{', '.join(ignored)}: as in the run that is continued, not as given now")
    else:
        if request.minutes is not None:
            budget = budget_of(request, trainer.device)
            trainer.print_to_log_file(budget.explanation)
            trainer.deadline = budget.deadline
            request = replace(request, epochs=budget.epochs, iterations_per_epoch=budget.iterations_per_epoch)
        trainer.configure(overrides_of(request, type(trainer)), settings_of(request))
    if not request.only_validate and (start is None or trainer.current_epoch < trainer.num_epochs):
        check_requirements(trainer)
        trainer.run_training(begin=partial(_begin, trainer, anew=start is None))
    # the rest is done by each on its own, and takes unequal times
    ranks.disconnect()
    if request.validate_best:
        trainer.load_checkpoint(str(folder / BEST))
    with device_errors(trainer):
        trainer.perform_actual_validation(request.save_probabilities)


def _begin(trainer: SemiSupervisedTrainer, anew: bool) -> Callable[[], None]:
    """What is to be done when nothing speaks against the training any more: ``run.json`` is written, with what is known
    now, and only then do the results of an earlier training go."""
    if not trainer.ranks.is_main:
        return lambda: None
    folder, record = Path(trainer.output_folder), run_record(trainer)

    def begun() -> None:
        write_json(record, folder / RECORD)
        if anew:
            for name in (FINAL, LATEST):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / PREVIEWS, ignore_errors=True)

    return begun


def _ignored_flags(request: TrainingRequest, trainer: SemiSupervisedTrainer) -> list[str]:
    """Flags that were given and cannot change a training that goes on."""
    given, kept = settings_of(request), trainer.settings
    flags = {
        "--set, --epochs, --iterations-per-epoch, --atlas-augmentation": overrides_of(request, type(trainer)),
        "--minutes": request.minutes is not None,
        "--seed": given.seed not in (None, kept.seed),
        "--deterministic": given.deterministic and not kept.deterministic,
        "--precision": given.precision not in ("auto", kept.precision),
        "--memory-format": given.memory_format not in ("auto", kept.memory_format),
    }
    return [flag for flag, ignored in flags.items() if ignored]


def _refuse_to_replace_plans(trainer: SemiSupervisedTrainer) -> None:
    """``UserError`` if finished folds beside this one predict with another plan, which the training would replace."""
    own = Path(trainer.output_folder)
    plans, configuration = trainer.plans_manager.plans, trainer.configuration_name
    for fold in sorted(own.parent.glob("fold_*")):
        record = fold / RECORD
        if fold == own or not (fold / FINAL).is_file() or not record.is_file():
            continue
        trained = read_json(record).get("plan")
        differing = trained and data_differences(trained, plans, configuration)
        if differing:
            raise UserError(
                "a finished fold of this model was trained with another plan, and could no longer predict after this "
                "training: the folds of a model share plans.json",
                where=fold,
                found=f"another {', another '.join(differing)}",
                fix=f"keep it by choosing another nnUNet_results, or delete {own.parent} and train all folds anew",
            )


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
    weights = request.pretrained_weights
    if weights and Path(weights).resolve().parent == folder.resolve():
        raise UserError(
            "the pretrained weights are of the run that this training replaces", where=weights, fix="copy them first"
        )
    if existing and not request.overwrite:
        raise UserError(
            "this run has been trained before",
            where=existing[0],
            fix="continue it with --c, start again with --overwrite, or keep it by choosing another nnUNet_results",
        )
    return None
