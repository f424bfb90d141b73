from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nnssl.errors import UserError
from nnssl.inference.models import auto_record, find_model
from nnssl.trainers import choosing
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.choosing import (
    ENOUGH_REGISTERED,
    FEW_LABELED,
    FEWEST_LABELED,
    FEWEST_STEPS_LATE,
    FEWEST_STEPS_REGISTERED,
    FEWEST_STEPS_SWITCHED,
    FEWEST_STEPS_SWITCHED_2D,
    FEWEST_UNLABELED,
    LATE,
    LONG_STEPS,
    MOST_REGISTERED,
    MOST_SWITCHED,
    MOST_SWITCHED_2D,
    RULES,
    Rule,
    Situation,
    choose,
)
from nnssl.trainers.engine import auto, budget, registered_labels
from nnssl.trainers.engine.auto import situation_of, with_choice
from nnssl.trainers.engine.request import TrainingRequest, requested_plan
from nnssl.trainers.engine.run import run
from nnssl.trainers.engine.settings import check_overrides, parse_overrides
from nnssl.trainers.registry import get_trainer
from nnssl.utils.paths import preprocessed_folder, raw_folder, results_folder
from tests.support.locks import held_by_another
from tests.support.tiny import NAME, PLANS, Tiny

USUAL = Situation(labeled=4, patients=4, unlabeled=100, steps=250_000, steps_after_registration=250_000)


@pytest.mark.parametrize(
    ("changes", "trainer"),
    [
        ({}, "BCP"),
        ({"labeled": FEWEST_LABELED}, "BCP"),
        ({"labeled": FEWEST_LABELED - 1}, "Supervised"),
        ({"labeled": FEW_LABELED}, "BCP"),
        ({"labeled": FEW_LABELED + 1}, "Supervised"),
        ({"unlabeled": 0}, "Supervised"),
        ({"unlabeled": FEWEST_UNLABELED - 1}, "Supervised"),
        ({"unlabeled": FEWEST_UNLABELED}, "BCP"),
        ({"steps": LONG_STEPS - 1}, "Supervised"),
        ({"cascaded": True}, "Supervised"),
        ({"dimensions": 2}, "Supervised"),
        ({"dimensions": 2, "labeled": 2, "corresponding": True, "registrable": 100}, "Supervised"),
    ],
)
def test_rules(changes, trainer):
    choice = choose(replace(USUAL, **changes))
    assert choice.trainer == trainer
    unused = replace(USUAL, **changes).unlabeled > 0 and trainer == "Supervised"
    assert any("are not used" in reason for reason in choice.reasons) == unused


@pytest.mark.parametrize(
    ("changes", "switched"),
    [
        ({"steps": LONG_STEPS - 1}, True),
        ({"unlabeled": FEWEST_UNLABELED - 1}, True),
        ({"steps": FEWEST_STEPS_SWITCHED}, True),
        ({"steps": FEWEST_STEPS_SWITCHED - 1}, False),
        ({"steps": LONG_STEPS - 1, "patients": MOST_SWITCHED}, True),
        ({}, False),
        ({"steps": LONG_STEPS - 1, "patients": MOST_SWITCHED + 1}, False),
        ({"steps": LONG_STEPS - 1, "corresponding": False}, False),
    ],
)
def test_few_corresponding_cases_are_switched_in_short_trainings(changes, switched):
    choice = choose(replace(USUAL, **{"labeled": 2, "patients": 2, "corresponding": True} | changes))
    assert (choice.trainer == "SwitchedSupervised") == switched
    assert not choice.overrides
    if not changes:
        assert choice.trainer == "BCP"


@pytest.mark.parametrize(
    ("changes", "switched"),
    [
        ({}, True),
        ({"patients": MOST_SWITCHED_2D + 1}, False),
        ({"corresponding": False}, False),
        ({"steps": FEWEST_STEPS_SWITCHED_2D}, True),
        ({"steps": FEWEST_STEPS_SWITCHED_2D - 1}, False),
        ({"steps": LONG_STEPS}, False),
        ({"cascaded": True}, False),
    ],
)
def test_few_corresponding_images_are_switched_in_short_trainings(changes, switched):
    images = {"dimensions": 2, "labeled": 8, "patients": 8, "corresponding": True, "steps": 2_000}
    choice = choose(replace(USUAL, **images | changes))
    assert choice.trainer == ("SwitchedSupervised" if switched else "Supervised")


@pytest.mark.parametrize(
    ("changes", "late"),
    [
        ({}, True),
        ({"labeled": 4, "patients": MOST_SWITCHED}, True),
        ({"labeled": 5, "patients": MOST_SWITCHED + 1}, False),
        ({"corresponding": False}, False),
        ({"unlabeled": FEWEST_UNLABELED - 1}, False),
        ({"steps_after_pseudo_labels": FEWEST_STEPS_LATE - 1}, False),
        ({"steps": LONG_STEPS}, False),
        ({"dimensions": 2}, False),
        ({"labeled": 2, "patients": 2, "registrable": 100}, False),
    ],
)
def test_few_corresponding_cases_get_late_pseudo_labels_where_there_is_time(changes, late):
    usual = {"corresponding": True, "steps": LONG_STEPS - 1, "steps_after_pseudo_labels": FEWEST_STEPS_LATE}
    choice = choose(replace(USUAL, **usual | changes))
    assert (choice.overrides == LATE) == late
    if late:
        assert choice.trainer == "SwitchedSelfTraining"
        assert not any("are not used" in reason for reason in choice.reasons)


@pytest.mark.parametrize(
    ("changes", "registered"),
    [
        ({}, True),
        ({"steps_after_registration": FEWEST_STEPS_REGISTERED}, True),
        ({"steps_after_registration": FEWEST_STEPS_REGISTERED - 1}, False),
        ({"labeled": MOST_REGISTERED}, True),
        ({"labeled": MOST_REGISTERED + 1}, False),
        ({"labeled": 1}, False),
        ({"corresponding": False}, False),
        ({"registrable": FEWEST_UNLABELED - 1}, False),
        ({"unlabeled": FEWEST_UNLABELED - 1}, False),
        ({"cascaded": True}, False),
    ],
)
def test_labels_are_registered_where_anatomy_and_time_allow_it(changes, registered):
    choice = choose(replace(USUAL, **{"labeled": 2, "corresponding": True, "registrable": 100} | changes))
    expected = {"initial_pseudo_labels": "registration", "rounds": 1}
    assert (choice.trainer == "SwitchedSelfTraining") == registered
    assert (expected.items() <= choice.overrides.items()) == registered


def test_the_reasons_name_patients_where_they_have_several_scans():
    several = choose(replace(USUAL, labeled=8, patients=4, steps=1_000, corresponding=True))
    assert several.trainer == "SwitchedSupervised"
    assert several.reasons[0] == "8 labeled of 4 patients and 100 unlabeled cases, 1,000 steps"
    assert choose(USUAL).reasons[0].startswith("4 labeled and 100 unlabeled cases")


def test_no_more_cases_are_registered_than_there_is_time_for():
    choice = choose(replace(USUAL, labeled=2, corresponding=True, registrable=40))
    assert choice.overrides["registered_cases"] == 40
    assert any("registered to 40 unlabeled cases, for which there is time" in reason for reason in choice.reasons)


def test_no_more_cases_are_registered_than_gain():
    two = replace(USUAL, labeled=2, corresponding=True, registrable=1_000)
    choice = choose(replace(two, unlabeled=1_000))
    assert choice.overrides["registered_cases"] == ENOUGH_REGISTERED
    assert any(
        f"registered to {ENOUGH_REGISTERED} unlabeled cases, which are enough" in text for text in choice.reasons
    )
    few = choose(replace(two, unlabeled=ENOUGH_REGISTERED, registrable=ENOUGH_REGISTERED))
    assert "registered_cases" not in few.overrides


def test_every_rule_names_a_trainer_its_hyper_parameters_and_a_reason():
    assert RULES[-1].holds(USUAL)
    for rule in RULES:
        check_overrides(get_trainer(rule.trainer), rule.overrides)
        assert rule.when
        assert rule.because


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    return Tiny(labeled=3, unlabeled=FEWEST_UNLABELED, labeled_batch=2).write(tmp_path, monkeypatch)


def request(**options) -> TrainingRequest:
    options = {"epochs": 1, "iterations_per_epoch": 2, "device": "cpu", "disable_memory_check": True} | options
    return TrainingRequest("901", "auto", "all", plans=PLANS, **options)


def chosen(**options) -> TrainingRequest:
    return with_choice(request(**options), torch.device("cpu"))


def results() -> Path:
    return results_folder() / NAME


def test_auto_trains_what_the_rules_say_and_prediction_finds_it(tiny, capsys):
    run(request(seed=0))
    out = capsys.readouterr().out
    assert "auto: Supervised\n" in out
    assert f"3 labeled and {FEWEST_UNLABELED} unlabeled cases, 2 steps" in out
    assert f"the {FEWEST_UNLABELED} unlabeled cases are not used" in out
    assert find_model(NAME, trainer="auto").folder.name.startswith("Supervised__")
    record = json.loads(auto_record(results(), PLANS, tiny.configuration).read_text())
    assert record["situation"] == {
        "labeled": 3,
        "patients": 3,
        "unlabeled": FEWEST_UNLABELED,
        "steps": 2,
        "dimensions": 3,
        "cascaded": False,
        "corresponding": False,
        "registrable": 0,
        "steps_after_registration": 2,
        "steps_after_pseudo_labels": 2,
    }


def trained(tiny, trainer: str, fold: str) -> None:
    """Leaves what tells that a training has begun."""
    folder = results() / f"{trainer}__{PLANS}__{tiny.configuration}" / f"fold_{fold}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")


def test_the_choice_of_the_first_run_holds_for_the_others(tiny, capsys):
    assert chosen().trainer == "Supervised"
    assert chosen(epochs=LONG_STEPS).trainer == "BCP", "nothing has been trained with the first choice"
    assert chosen().trainer == "Supervised"
    trained(tiny, "Supervised", "all")
    capsys.readouterr()
    assert chosen(epochs=LONG_STEPS).trainer == "Supervised"
    assert "(as in" in capsys.readouterr().out
    assert chosen(epochs=LONG_STEPS, overwrite=True, resume=True).trainer == "Supervised"
    # the only run may be made anew with another method, one of several may not
    assert chosen(epochs=LONG_STEPS, overwrite=True).trainer == "BCP"
    trained(tiny, "BCP", "all")
    trained(tiny, "BCP", "0")
    assert chosen(overwrite=True).trainer == "BCP"


def test_the_choice_of_a_run_that_is_beginning_holds_for_the_others(tiny):
    assert chosen().trainer == "Supervised"
    beginning = results() / f"Supervised__{PLANS}__{tiny.configuration}" / "fold_0"
    with held_by_another(beginning):
        assert chosen(epochs=LONG_STEPS).trainer == "Supervised"
    assert chosen(epochs=LONG_STEPS).trainer == "BCP", "it ended before it was recorded"


def test_two_trainings_do_not_choose_at_the_same_time(tiny, capsys):
    with held_by_another(results()) as (other, _):
        end = threading.Timer(3, other.kill)
        end.start()
        run(request(seed=0))
        assert end.finished.is_set()
    out = capsys.readouterr().out
    assert out.index("Waiting until it is done, another process chooses what auto trains") < out.index(
        "auto: Supervised"
    )


def test_others_may_choose_while_a_run_trains(tiny, monkeypatch):
    held = []

    def train(asked: TrainingRequest, trainer: SemiSupervisedTrainer) -> None:
        probe = f"from nnssl.utils.lock import is_held; print(is_held({str(results())!r}), "
        probe += f"is_held({trainer.output_folder!r}))"
        held.append(subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout)

    monkeypatch.setattr("nnssl.trainers.engine.run._train_and_validate", train)
    run(request(seed=0))
    assert held == ["False True\n"]


def test_a_common_place_is_read_from_the_plans_and_needs_two_cases_of_the_fold(tiny):
    file = preprocessed_folder() / NAME / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    block = plans["configurations"][tiny.configuration].setdefault("semi_supervised", {})
    for common, fold, expected in ((True, "all", True), (True, "0", True), (False, "all", False)):
        block["atlas_evidence"] = {"pairs": 3, "common_place": common, "overlap": {}}
        file.write_text(json.dumps(plans))
        asked = replace(request(epochs=FEWEST_STEPS_SWITCHED), fold=fold)
        assert (with_choice(asked, torch.device("cpu")).trainer == "SwitchedSupervised") == expected
    plan = requested_plan(request())
    plan.plans["configurations"][tiny.configuration]["semi_supervised"]["atlas_evidence"]["common_place"] = True
    assert situation_of(plan, "0").corresponding
    assert situation_of(plan, "0").labeled == 2
    splits = [{"train": ["labeled_0"], "val": ["labeled_1", "labeled_2"], "unlabeled": ["unlabeled_3"]}]
    (preprocessed_folder() / NAME / "splits_final.json").write_text(json.dumps(splits))
    alone = situation_of(plan, "0")
    assert (alone.labeled, alone.unlabeled, alone.corresponding) == (1, 1, False)


def test_scans_of_a_patient_count_as_one(tiny):
    file = preprocessed_folder() / NAME / "dataset_fingerprint.json"
    plan = requested_plan(request())
    block = plan.plans["configurations"][tiny.configuration].setdefault("semi_supervised", {})
    block["atlas_evidence"] = {"pairs": 3, "common_place": True, "overlap": {}}
    for groups, patients, corresponding in (
        ({"labeled_0": "anna", "labeled_2": "anna"}, 2, True),
        ({f"labeled_{i}": "anna" for i in range(3)}, 1, False),
    ):
        file.write_text(json.dumps({"provenance": {"groups": groups}}))
        found = situation_of(plan, "all")
        assert (found.labeled, found.patients, found.corresponding) == (3, patients, corresponding)


def test_registration_needs_the_raw_data_and_time(tiny, monkeypatch):
    def registrable(minutes: float | None = None) -> int:
        return situation_of(requested_plan(request()), "all", minutes).registrable

    assert registrable() == 0
    raw = raw_folder() / NAME
    for folder in ("imagesTr", "labelsTr", "imagesUn"):
        (raw / folder).mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps(tiny.dataset_json() | {"numTraining": 0}))
    assert registrable() == 0
    images = list(tiny.base.glob("*_unlabeled/*[0-9].b2nd"))
    assert len(images) == FEWEST_UNLABELED
    for image in images[1:]:
        (raw / "imagesUn" / f"{image.stem}_0000.nii.gz").touch()
        image.with_suffix(".pkl").write_bytes(pickle.dumps({"shape_before_cropping": (10, 20, 30)}))
    assert registrable() == FEWEST_UNLABELED - 1
    monkeypatch.setattr(registered_labels, "default_processes", lambda: 4)
    # a scan takes 162 s on one core
    monkeypatch.setattr(registered_labels, "expected_seconds", lambda shape: {(10, 20, 30): 162 / tiny.labeled}[shape])
    assert registrable(minutes=6) == 2
    monkeypatch.setattr(auto.os, "access", lambda folder, mode: False)
    assert registrable(minutes=6) == 0, "the masks could not be kept"


@pytest.mark.parametrize("stage", ["previous_stage", "next_stage"])
def test_stages_of_a_cascade_are_told(tiny, stage):
    plan = requested_plan(request())
    assert not situation_of(plan, "all").cascaded
    plan.plans["configurations"][tiny.configuration][stage] = "3d_other"
    assert situation_of(plan, "all").cascaded


def test_auto_cannot_be_validated_before_it_was_trained(tiny):
    with pytest.raises(UserError, match="auto has not been trained"):
        chosen(only_validate=True)
    assert not auto_record(results(), PLANS, tiny.configuration).exists()


def test_auto_may_stand_for_different_methods_in_different_configurations(tiny):
    for configuration, trainer in (("2d", "BCP"), ("3d_fullres", "Supervised")):
        folder = results() / f"{trainer}__{PLANS}__{configuration}"
        (folder / "fold_0").mkdir(parents=True)
        for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
            (folder / name).touch()
        auto_record(results(), PLANS, configuration).write_text(json.dumps({"trainer": trainer}))
    assert find_model(NAME, trainer="auto").folder.name.startswith("Supervised__")
    assert find_model(NAME, trainer="auto", configuration="2d").folder.name.startswith("BCP__")
    with pytest.raises(UserError, match="no trained model with trainer auto, configuration 3d_lowres"):
        find_model(NAME, trainer="auto", configuration="3d_lowres")


def test_what_the_user_sets_comes_last(tiny, monkeypatch):
    switch = Rule("always", lambda s: True, "Supervised", {"atlas_augmentation": "regional_switch"}, "of the test")
    monkeypatch.setattr(choosing, "RULES", (switch,))
    asked = chosen(atlas_augmentation="none", overrides=["initial_lr=0.1"])
    assert (asked.atlas_augmentation, list(asked.overrides)) == ("none", ["initial_lr=0.1"])
    asked = chosen(overrides=["atlas_augmentation=none"])
    assert list(asked.overrides) == ["atlas_augmentation=regional_switch", "atlas_augmentation=none"]


def test_steps_may_be_given_as_hyper_parameters(tiny, capsys):
    chosen(epochs=None, iterations_per_epoch=None, overrides=["num_epochs=3"])
    assert "750 steps" in capsys.readouterr().out


def test_steps_are_those_that_the_minutes_allow(tiny, monkeypatch, capsys):
    monkeypatch.setattr(budget, "measure_costs", lambda trainer: budget.Costs(step=1, start=0))
    asked = chosen(epochs=None, iterations_per_epoch=None, minutes=1000)
    assert asked.trainer == "BCP"
    steps = int(re.search(r"unlabeled cases, ([0-9,]+) steps", capsys.readouterr().out)[1].replace(",", ""))
    assert 53_000 < steps <= 54_000
    assert asked.epochs is None, "the minutes are planned anew, for the method that was chosen"


@pytest.mark.parametrize(
    ("common", "between", "timed", "trainer"),
    [
        (True, 0, "SwitchedSelfTraining", "SwitchedSelfTraining"),
        (True, 3_240 - FEWEST_STEPS_LATE - 100, "SwitchedSelfTraining", "SwitchedSelfTraining"),
        (True, 3_240 - FEWEST_STEPS_LATE + 1, "SwitchedSelfTraining", "SwitchedSupervised"),
        (False, 0, "Supervised", "Supervised"),
    ],
)
def test_pseudo_labels_are_timed_where_they_may_be_made(tiny, monkeypatch, common, between, timed, trainer):
    file = preprocessed_folder() / NAME / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    block = plans["configurations"][tiny.configuration].setdefault("semi_supervised", {})
    block["atlas_evidence"] = {"pairs": 3, "common_place": common, "overlap": {}}
    file.write_text(json.dumps(plans))
    asked = []

    def costs_of(request: TrainingRequest, device: torch.device) -> budget.Costs:
        asked.append((request.trainer, len(request.overrides)))
        return budget.Costs(step=1, start=0, between=between)

    monkeypatch.setattr(auto, "costs_of", costs_of)
    found = chosen(epochs=None, iterations_per_epoch=None, minutes=60)
    assert found.trainer == trainer
    assert asked == [(timed, len(LATE) if timed == "SwitchedSelfTraining" else 0)]
    situation = json.loads(auto_record(results(), PLANS, tiny.configuration).read_text())["situation"]
    assert 3_200 < situation["steps"] <= 3_240
    assert situation["steps_after_registration"] == int(situation["steps"] * 2 / 3)
    if trainer == "SwitchedSelfTraining":
        overrides = check_overrides(get_trainer(trainer), parse_overrides(get_trainer(trainer), list(found.overrides)))
        assert overrides["round_shares"] == (2, 1)


def test_without_a_training_auto_stands_for_nothing(tiny):
    assert not auto_record(results(), PLANS, tiny.configuration).exists()
    with pytest.raises(UserError):
        find_model(NAME, trainer="auto")
