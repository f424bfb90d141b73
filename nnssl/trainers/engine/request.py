"""What ``nnssl_train`` is asked for, and the trainer that it means."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nnssl.errors import UserError
from nnssl.inference.device import choose_device
from nnssl.planners.plans_file import read_plans, refuse_foreign_code
from nnssl.preprocessing.configuration import require_preprocessed
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.distributed import current_ranks
from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.engine.settings import parse_overrides
from nnssl.trainers.registry import get_trainer
from nnssl.utils.files import read_json
from nnssl.utils.paths import dataset_name, preprocessed_folder, results_folder

DEFAULT_PLANS = "nnSSLPlans"


@dataclass(frozen=True)
class TrainingRequest:
    """What ``nnssl_train`` was asked for; None means 'choose'. Names are those of its flags.

    ``minutes`` begin at ``asked_at``, in seconds as ``time.time`` counts them.
    """

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
    minutes: float | None = None
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
    asked_at: float = field(default_factory=time.time)


def check_flags(request: TrainingRequest) -> None:
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
    if request.seed is not None and request.seed < 0:
        raise UserError("--seed must be a whole number from 0 on", found=request.seed)
    if request.minutes is not None:
        if not 0 < request.minutes < float("inf"):
            raise UserError("--minutes must be a time above 0", found=f"{request.minutes:g}")
        if request.epochs is not None or any(text.split("=")[0].strip() == "num_epochs" for text in request.overrides):
            raise UserError("--minutes decides on the number of epochs", fix="leave one of the two out")
    if request.num_gpus < 1:
        raise UserError("a training needs at least one process", found=f"-num_gpus {request.num_gpus}")
    if request.num_gpus > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("the number of processes is given twice, to torchrun and here", fix="leave -num_gpus out")


@dataclass(frozen=True)
class RequestedPlan:
    """The plan and configuration that a request means."""

    dataset: str
    folder: Path
    name: str
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]


def requested_plan(request: TrainingRequest) -> RequestedPlan:
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
    return RequestedPlan(name, base, plans_name, plans, configuration, dataset_json)


def trainer_class_of(request: TrainingRequest) -> type[SemiSupervisedTrainer]:
    trainer_class = get_trainer(request.trainer)
    if not issubclass(trainer_class, SemiSupervisedTrainer):
        raise UserError(
            f"{request.trainer} is a trainer of nnU-Net",
            fix=f"train it with nnUNetv2_train ... -tr {request.trainer} -p {request.plans or DEFAULT_PLANS}",
        )
    return trainer_class


def build_trainer(
    request: TrainingRequest, trainer_class: type[SemiSupervisedTrainer], device: torch.device
) -> SemiSupervisedTrainer:
    """A trainer for the requested plan, configuration and fold, not yet initialized."""
    plan = requested_plan(request)
    plan.plans["continue_training"] = request.resume
    return trainer_class(plan.plans, plan.configuration, _fold(request.fold), plan.dataset_json, device)


def new_trainer(request: TrainingRequest, device: torch.device) -> SemiSupervisedTrainer:
    """A trainer with the hyper-parameters and settings of the request, not yet initialized."""
    trainer_class = trainer_class_of(request)
    trainer = build_trainer(request, trainer_class, device)
    trainer.configure(overrides_of(request, trainer_class), settings_of(request))
    return trainer


def overrides_of(request: TrainingRequest, trainer_class: type[SemiSupervisedTrainer]) -> dict[str, Any]:
    """Hyper-parameters that the request sets."""
    return flags_of(request) | parse_overrides(trainer_class, request.overrides)


def flags_of(request: TrainingRequest) -> dict[str, Any]:
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


def settings_of(request: TrainingRequest) -> RunSettings:
    return RunSettings(
        seed=request.seed,
        deterministic=request.deterministic,
        precision=request.precision,
        memory_format=request.memory_format,
        micro_batch=request.micro_batch,
        memory_check=not request.disable_memory_check,
        preview_every=request.preview_every,
        # rounds of self-training read them again, perhaps after the training was continued from another folder
        pretrained_weights=request.pretrained_weights and os.path.abspath(request.pretrained_weights),
    )


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
