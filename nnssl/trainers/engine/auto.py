"""``auto`` in the place of a trainer: chosen once for the runs of a plan, and found again by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnssl.dataloading.cases import unlabeled_folder, unlabeled_identifiers
from nnssl.inference.models import AUTO, auto_record
from nnssl.trainers.choosing import Choice, Situation, choose
from nnssl.utils.files import read_json, write_json


def chosen_trainer(
    results: Path, plans_name: str, configuration: str, situation: Callable[[], Situation], *, again: bool
) -> Choice:
    """The choice for the runs of a plan and configuration, printed with its reasons.

    It is made and recorded by the first run, so that all folds train the same method.

    Args:
        results: folder of the data set in ``$nnUNet_results``.
        plans_name: name of the plans.
        configuration: of the plan.
        situation: looked at if a choice is to be made.
        again: whether a recorded choice is made anew.
    """
    file = auto_record(results, plans_name, configuration)
    if file.is_file() and not again:
        record = read_json(file, fix="delete it, and the method is chosen anew")
        choice, origin = Choice(record["trainer"], record["overrides"], tuple(record["reasons"])), f" (as in {file})"
    else:
        now = situation()
        choice, origin = choose(now), ""
        write_json({**asdict(choice), "situation": asdict(now)}, file)
    settings = "".join(f", {name}={value}" for name, value in choice.overrides.items())
    print(f"{AUTO}: {choice.trainer}{settings}{origin}")
    for reason in choice.reasons:
        print(f"  {reason}")
    return choice


def situation_of(preprocessed: Path, plans: dict[str, Any], configuration: str, steps: int) -> Situation:
    """What the preprocessed data and the plan say.

    Args:
        preprocessed: folder of the data set in ``$nnUNet_preprocessed``.
        plans: content of the plans file.
        configuration: name of a configuration of it.
        steps: of the training.
    """
    planned = _inherited(plans["configurations"], configuration)
    folder = preprocessed / planned["data_identifier"]
    evidence = planned.get("semi_supervised", {}).get("atlas_evidence", {})
    return Situation(
        labeled=len(infer_dataset_class(str(folder)).get_identifiers(str(folder))),
        unlabeled=len(unlabeled_identifiers(unlabeled_folder(folder))),
        common_place=evidence["common_place"] if evidence.get("pairs") else None,
        steps=steps,
    )


def _inherited(configurations: dict[str, Any], name: str) -> dict[str, Any]:
    own = configurations[name]
    return (_inherited(configurations, own["inherits_from"]) if "inherits_from" in own else {}) | own
