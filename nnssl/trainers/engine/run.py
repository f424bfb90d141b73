"""From a request ('train this method on that data set') to a finished run."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nnssl.errors import UserError
from nnssl.inference.device import choose_device
from nnssl.inference.models import AUTO
from nnssl.planners.plans_file import read_plans, refuse_foreign_code
from nnssl.preprocessing.configuration import require_preprocessed
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.auto import chosen_trainer, situation_of
from nnssl.trainers.engine.distributed import current_ranks, joined, ranks_of_environment
from nnssl.trainers.engine.launch import launch
from nnssl.trainers.engine.loop import BEST, FINAL, LATEST
from nnssl.trainers.engine.preview import FOLDER as PREVIEWS
from nnssl.trainers.engine.record import record_run
from nnssl.trainers.engine.requirements import check_requirements
from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.engine.settings import parse_overrides
from nnssl.trainers.registry import get_trainer
from nnssl.utils.files import read_json
from nnssl.utils.lock import only_process
from nnssl.utils.paths import dataset_name, preprocessed_folder, results_folder

DEFAULT_PLANS = "nnSSLPlans"
STEPS_NAME = "num_iterations_per_epoch"


@dataclass(frozen=True)
class TrainingRequest:
    """What ``nnssl_train`` was asked for; None means 'choose'. Names are those of its flags."""

    dataset: str
    trainer: str
    fold: str
    configuration: str | None = None
    plans: str | None = None
    device: str | None = None
    num_gpus: int = 1
    overrides: Sequence[str] = ()
    atlas_augmentation: str | None = None
    epochs: int | None = None
    iterations_per_epoch: int | None = None
    seed: int | None = None
    deterministic: bool = False
    precision: str = "auto"
    memory_format: str = "auto"
    micro_batch: int | None = None
    disable_memory_check: bool = False
    preview_every: int | None = None
    pretrained_weights: str | None = None
    resume: bool = False
    only_validate: bool = False
    validate_best: bool = False
    save_probabilities: bool = False
    disable_checkpointing: bool = False
    overwrite: bool = False


def run(request: TrainingRequest) -> None:
    """Trains and validates as requested, in this process, in ``num_gpus`` new ones, or as one of those of torchrun.

    Raises:
        UserError: for anything a user can mend, before the first step wherever possible.
    """
    _check_flags(request)
    if request.trainer == AUTO:
        request = _with_choice(request)
    if request.num_gpus > 1:
        launch(_run_rank, (replace(request, num_gpus=1),), request.num_gpus)
    else:
        with joined(ranks_of_environment()):
            _run_rank(request)


def _run_rank(request: TrainingRequest) -> None:
    ranks = current_ranks()
    trainer_class = _trainer_class(request)
    overrides = _flags(request) | parse_overrides(trainer_class, request.overrides)
    device = prepare_device(request.device)
    trainer = build_trainer(request, trainer_class, device)
    folder = Path(trainer.output_folder)
    trainer.disable_checkpointing = request.disable_checkpointing
    with contextlib.ExitStack() as lock:
        # the ranks of a training share the lock of the first
        ranks.from_main(lambda: lock.enter_context(only_process(folder, "trains this run")))
        _train_and_validate(request, trainer, overrides)


def _train_and_validate(request: TrainingRequest, trainer: SemiSupervisedTrainer, overrides: dict[str, Any]) -> None:
    ranks, folder = trainer.ranks, Path(trainer.output_folder)
    start = ranks.from_main(lambda: _checkpoint_to_load(request, folder))
    if start is not None:
        trainer.load_checkpoint(start)
        # these do not change the result, and a training may go on where there is less memory
        trainer.settings.micro_batch = request.micro_batch or trainer.settings.micro_batch
        trainer.settings.memory_check = not request.disable_memory_check
        if request.preview_every is not None:
            trainer.settings.preview_every = request.preview_every
        if overrides:
            trainer.print_to_log_file(
                "--set, --epochs, --iterations-per-epoch and --atlas-augmentation are those of the continued run"
            )
    else:
        trainer.configure(overrides, _settings(request))
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


def new_trainer(request: TrainingRequest, device: torch.device) -> SemiSupervisedTrainer:
    """A trainer with the hyper-parameters and settings of the request, not yet initialized."""
    trainer_class = _trainer_class(request)
    overrides = _flags(request) | parse_overrides(trainer_class, request.overrides)
    trainer = build_trainer(request, trainer_class, device)
    trainer.configure(overrides, _settings(request))
    return trainer


def _trainer_class(request: TrainingRequest) -> type[SemiSupervisedTrainer]:
    trainer_class = get_trainer(request.trainer)
    if not issubclass(trainer_class, SemiSupervisedTrainer):
        raise UserError(
            f"{request.trainer} is a trainer of nnU-Net",
            fix=f"train it with nnUNetv2_train ... -tr {request.trainer} -p {request.plans or DEFAULT_PLANS}",
        )
    return trainer_class


def prepare_device(name: str | None) -> torch.device:
    """`choose_device`, with a sentence if the choice fell on the CPU, and the number of threads set.

    All cores that this process may use work on the step on a CPU; beside an accelerator one thread is best. The ranks
    of a machine share its cores, and get a CUDA device each.
    """
    ranks = current_ranks()
    device = choose_device(name)
    if name is None and device.type == "cpu":
        print("No CUDA device found: running on the CPU.")
    cores = len(os.sched_getaffinity(0)) // ranks.local_size
    torch.set_num_threads(max(1, cores) if device.type == "cpu" else 1)
    if ranks.size == 1 or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UserError(f"several processes cannot train on {device.type}", fix="leave -num_gpus out")
    if ranks.local_size > torch.cuda.device_count():
        raise UserError(
            "there are fewer CUDA devices than processes",
            expected=f"{ranks.local_size} devices",
            found=torch.cuda.device_count(),
            fix="start fewer processes, or look at CUDA_VISIBLE_DEVICES",
        )
    torch.cuda.set_device(ranks.local_rank)
    return torch.device("cuda", ranks.local_rank)


@dataclass(frozen=True)
class _RequestedPlan:
    """The plan and configuration that a request means."""

    dataset: str
    folder: Path
    name: str
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]


def _requested_plan(request: TrainingRequest) -> _RequestedPlan:
    name = dataset_name(request.dataset)
    base = preprocessed_folder() / name
    results_folder()
    plans_name = request.plans or _only_plans(base, name)
    advice = f"nnssl_plan_and_preprocess -d {name}"
    plans = read_plans(base / f"{plans_name}.json", fix=advice)
    if plans["dataset_name"] != name:
        raise UserError(
            "the plans were made for another data set",
            where=base / f"{plans_name}.json",
            expected=name,
            found=plans["dataset_name"],
            fix=advice,
        )
    dataset_json = read_json(base / "dataset.json", fix=advice)
    planned = list(plans["configurations"])
    configuration = request.configuration or ("3d_fullres" if "3d_fullres" in planned else "2d")
    if configuration not in planned:
        raise UserError(
            f"configuration {configuration} is not planned",
            where=base / f"{plans_name}.json",
            expected=", ".join(planned),
            found=configuration,
        )
    refuse_foreign_code(plans, configuration, base / f"{plans_name}.json")
    require_preprocessed(plans, configuration, dataset_json)
    return _RequestedPlan(name, base, plans_name, plans, configuration, dataset_json)


def _with_choice(request: TrainingRequest) -> TrainingRequest:
    """The request with the trainer and the hyper-parameters that ``auto`` stands for; those of the user come last."""
    plan = _requested_plan(request)
    budget = [text for text in request.overrides if text.split("=")[0].strip() in ("num_epochs", STEPS_NAME)]
    values = _flags(request) | parse_overrides(SemiSupervisedTrainer, budget)
    steps = values.get("num_epochs", SemiSupervisedTrainer.num_epochs)
    steps *= values.get(STEPS_NAME, SemiSupervisedTrainer.num_iterations_per_epoch)
    choice = chosen_trainer(
        results_folder() / plan.dataset,
        plan.name,
        plan.configuration,
        lambda: situation_of(plan.folder, plan.plans, plan.configuration, steps),
        again=request.overwrite,
    )
    chosen = [f"{name}={value}" for name, value in choice.overrides.items() if name not in _flags(request)]
    return replace(request, trainer=choice.trainer, overrides=[*chosen, *request.overrides])


def build_trainer(
    request: TrainingRequest, trainer_class: type[SemiSupervisedTrainer], device: torch.device
) -> SemiSupervisedTrainer:
    """A trainer for the requested plan, configuration and fold, not yet initialized."""
    plan = _requested_plan(request)
    plan.plans["continue_training"] = request.resume
    return trainer_class(plan.plans, plan.configuration, _fold(request.fold), plan.dataset_json, device)


def _settings(request: TrainingRequest) -> RunSettings:
    return RunSettings(
        seed=request.seed,
        deterministic=request.deterministic,
        precision=request.precision,
        memory_format=request.memory_format,
        micro_batch=request.micro_batch,
        memory_check=not request.disable_memory_check,
        preview_every=request.preview_every,
        pretrained_weights=request.pretrained_weights,
    )


def _flags(request: TrainingRequest) -> dict[str, Any]:
    """Hyper-parameters that have a flag of their own."""
    budget: dict[str, Any] = {}
    if request.epochs is not None:
        budget["num_epochs"] = request.epochs
    if request.iterations_per_epoch is not None:
        budget["num_iterations_per_epoch"] = request.iterations_per_epoch
        # nnU-Net's proportion of 50 validation patches batches to 250 steps
        budget["num_val_iterations_per_epoch"] = max(1, request.iterations_per_epoch // 5)
    for name, value in budget.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1", found=value)
    augmentation = request.atlas_augmentation
    return budget | ({"atlas_augmentation": augmentation} if augmentation is not None else {})


def _check_flags(request: TrainingRequest) -> None:
    if request.resume and request.only_validate:
        raise UserError("--c continues a training and --val only validates: give one of them")
    if request.resume and request.pretrained_weights:
        raise UserError("a training that is continued has weights of its own", fix="leave -pretrained_weights out")
    if request.validate_best and request.disable_checkpointing:
        raise UserError("--val_best needs the checkpoints that --disable_checkpointing leaves out")
    if request.micro_batch is not None and request.micro_batch < 1:
        raise UserError("--micro-batch must be at least 1", found=request.micro_batch)
    if request.preview_every is not None and request.preview_every < 0:
        raise UserError("--preview-every must be a number of epochs, or 0 for no pictures", found=request.preview_every)
    if request.num_gpus < 1:
        raise UserError("a training needs at least one process", found=f"-num_gpus {request.num_gpus}")
    if request.num_gpus > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the number of processes is given twice, to torchrun and here", fix="leave -num_gpus out")


def _fold(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdigit():
        raise UserError("not a fold", found=text, expected="a number from 0 on, or all")
    return int(text)


def _only_plans(base: Path, name: str) -> str:
    """nnSSLPlans, or the only other plans that were made by a planner of nnssl."""
    if (base / f"{DEFAULT_PLANS}.json").is_file():
        return DEFAULT_PLANS
    candidates = []
    for path in sorted(base.glob("*Plans.json")) if base.is_dir() else []:
        if "semi_supervised" in read_plans(path, fix=f"nnssl_plan_and_preprocess -d {name}"):
            candidates.append(path.stem)
    if len(candidates) == 1:
        return candidates[0]
    raise UserError(
        "there are no plans for this data set" if not candidates else "there are several plans for this data set",
        where=base,
        found=", ".join(candidates) or None,
        fix="choose one with -p" if candidates else f"nnssl_plan_and_preprocess -d {name}",
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
    if existing and not request.overwrite:
        raise UserError(
            "this run has been trained before",
            where=existing[0],
            fix="continue it with --c, start again with --overwrite, or keep it by choosing another nnUNet_results",
        )
    return None
