"""``auto`` in the place of a trainer: chosen once for the runs of a plan, and found again by name."""

from __future__ import annotations

import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnssl.dataloading.cases import unlabeled_folder, unlabeled_identifiers
from nnssl.dataset.raw import RawDataset
from nnssl.dataset.splits import SPLITS_FILE, load_fold
from nnssl.errors import UserError
from nnssl.inference.models import AUTO, auto_record
from nnssl.preprocessing.fingerprint import FINGERPRINT_FILE, patients_of
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.choosing import FEWEST_STEPS_LATE, LATE, Situation, choose
from nnssl.trainers.engine.budget import costs_of
from nnssl.trainers.engine.distributed import current_ranks
from nnssl.trainers.engine.record import RECORD
from nnssl.trainers.engine.registered_labels import SHARE_OF_MINUTES, seconds_per_case
from nnssl.trainers.engine.request import RequestedPlan, TrainingRequest, flags_of, requested_plan
from nnssl.trainers.engine.settings import parse_overrides
from nnssl.utils.files import read_json, write_json
from nnssl.utils.lock import is_held
from nnssl.utils.paths import preprocessed_folder, results_folder

REGISTRATION_MINUTES = 60
"""For registration, at most, where the user names no minutes."""

_LENGTH = ("num_epochs", "num_iterations_per_epoch")


def with_choice(request: TrainingRequest, device: torch.device, *, keep: bool = True) -> TrainingRequest:
    """The request with the trainer and the hyper-parameters that ``auto`` stands for; those of the user come last.

    The choice is recorded, and holds as long as there is another run of it, so that all folds train the same method;
    otherwise it is made anew. It is printed with its reasons.

    Args:
        request: for the trainer ``auto``.
        device: to train on.
        keep: whether a new choice is recorded.

    Raises:
        UserError: if a training is to be validated, and none was chosen.
    """
    plan = requested_plan(request)
    file = auto_record(results_folder() / plan.dataset, plan.name, plan.configuration)
    holds = current_ranks().from_main(lambda: _holds(file, request))
    if not holds and request.only_validate:
        raise UserError("auto has not been trained", where=file.parent, fix=f"nnssl_train {request.dataset} auto FOLD")
    if holds:
        record = _recorded(file)
    else:
        # ranks on other machines may have other numbers of cores
        found = current_ranks().from_main(lambda: asdict(situation_of(plan, request.fold, request.minutes)))
        situation = _with_steps(Situation(**found), request, device)
        record = {**asdict(choose(situation)), "situation": asdict(situation)}
        if keep:
            current_ranks().from_main(lambda: write_json(record, file))
    chosen = record["overrides"]
    origin = f" (as in {file})" if holds else ""
    print(f"{AUTO}: {record['trainer']}{''.join(f', {name}={value}' for name, value in chosen.items())}{origin}")
    for reason in record["reasons"]:
        print(f"  {reason}")
    flags = flags_of(request)
    overrides = [f"{name}={value}" for name, value in chosen.items() if name not in flags]
    return replace(request, trainer=record["trainer"], overrides=[*overrides, *request.overrides])


def _holds(file: Path, request: TrainingRequest) -> bool:
    """Whether a run of the recorded trainer exists or is beginning, other than the one that is to be overwritten."""
    if not file.is_file():
        return False
    trainer = _recorded(file)["trainer"]
    runs = file.parent / file.stem.replace(AUTO, trainer, 1)
    folds = {fold.name for fold in runs.glob("fold_*") if (fold / RECORD).is_file() or is_held(fold)}
    if request.overwrite and not (request.resume or request.only_validate):
        folds.discard(f"fold_{request.fold}")
    return bool(folds)


def _recorded(file: Path) -> dict[str, Any]:
    return read_json(file, fix="delete it, and the method is chosen anew")


def _with_steps(situation: Situation, request: TrainingRequest, device: torch.device) -> Situation:
    """The situation with the steps of the training, or those for which there is time.

    They are timed with `Supervised`; where pseudo-labels may be made, with these, whose steps take as long.
    """
    if request.minutes is None:
        length = flags_of(request) | parse_overrides(SemiSupervisedTrainer, _length(request))
        steps = math.prod(length.get(name, getattr(SemiSupervisedTrainer, name)) for name in _LENGTH)
        return replace(situation, steps=steps, steps_after_registration=steps, steps_after_pseudo_labels=steps)
    enough = replace(situation, steps=FEWEST_STEPS_LATE, steps_after_pseudo_labels=FEWEST_STEPS_LATE)
    late = choose(enough).overrides == LATE
    timed = replace(
        request,
        trainer="SwitchedSelfTraining" if late else "Supervised",
        overrides=[*(f"{name}={value}" for name, value in LATE.items() if late), *_length(request)],
    )
    costs = costs_of(timed, device)
    steps, with_predictions = current_ranks().from_main(
        lambda: (replace(costs, between=0.0).steps_of(request), costs.steps_of(request))
    )
    return replace(
        situation,
        steps=steps,
        steps_after_registration=int(steps * (1 - SHARE_OF_MINUTES)),
        steps_after_pseudo_labels=with_predictions if late else 0,
    )


def _length(request: TrainingRequest) -> list[str]:
    """The overrides of the user that say how long a training is; others may be of the method that is not yet known."""
    return [text for text in request.overrides if text.split("=")[0].strip() in _LENGTH]


def situation_of(plan: RequestedPlan, fold: str, minutes: float | None = None) -> Situation:
    """What the preprocessed data and the plan say; nothing of steps.

    Args:
        plan: of the training.
        fold: that is trained; it says how many cases there are.
        minutes: for the whole training, if the user has named them.
    """
    planned = _inherited(plan.plans["configurations"], plan.configuration)
    folder = plan.folder / planned["data_identifier"]
    cases = infer_dataset_class(str(folder)).get_identifiers(str(folder))
    trained = load_fold(plan.folder / SPLITS_FILE, fold, cases, unlabeled_identifiers(unlabeled_folder(folder)))
    labeled, unlabeled = len(trained.train), trained.unlabeled
    fingerprint = read_json(plan.folder / FINGERPRINT_FILE, fix="run nnssl_plan_and_preprocess, which makes it again")
    patients = patients_of(fingerprint, trained.train)
    evidence = planned.get("semi_supervised", {}).get("atlas_evidence", {})
    return Situation(
        labeled=labeled,
        patients=patients,
        unlabeled=len(unlabeled),
        steps=0,
        dimensions=len(planned["patch_size"]),
        registrable=_registrable(plan.dataset, unlabeled_folder(folder), unlabeled, labeled, minutes),
        cascaded=any(planned.get(stage) is not None for stage in ("previous_stage", "next_stage")),
        corresponding=evidence.get("common_place", False) and patients > 1,
    )


def _registrable(dataset: str, folder: Path, unlabeled: list[str], labeled: int, minutes: float | None) -> int:
    """Unlabeled cases to which the labeled ones can be registered in the time that there is for it.

    0 if the raw data set is not at hand, which registration needs, or the masks cannot be kept.
    """
    if not os.access(preprocessed_folder() / dataset, os.W_OK):
        return 0
    try:
        raw = RawDataset.open(dataset)
    except UserError:
        return 0
    known = [case for case in unlabeled if case in raw.unlabeled]
    if not known:
        return 0
    seconds = 60 * (REGISTRATION_MINUTES if minutes is None else minutes * SHARE_OF_MINUTES)
    return min(len(known), int(seconds / seconds_per_case(folder, known, labeled)))


def _inherited(configurations: dict[str, Any], name: str) -> dict[str, Any]:
    own = configurations[name]
    return (_inherited(configurations, own["inherits_from"]) if "inherits_from" in own else {}) | own
