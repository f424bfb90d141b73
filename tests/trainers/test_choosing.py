from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nnssl.errors import UserError
from nnssl.inference.models import auto_record, find_model
from nnssl.trainers.choosing import FEW_LABELED, FEWEST_STEPS, FEWEST_UNLABELED, RULES, Situation, choose
from nnssl.trainers.engine import run as engine_run
from nnssl.trainers.engine.run import TrainingRequest, run
from nnssl.trainers.engine.settings import check_overrides
from nnssl.trainers.registry import get_trainer
from nnssl.utils.files import write_json
from tests.support.tiny import NAME, PLANS, Tiny

USUAL = Situation(labeled=4, unlabeled=100, common_place=True, steps=250_000)
SWITCH = {"atlas_augmentation": "regional_switch"}


@pytest.mark.parametrize(
    ("changes", "trainer", "overrides"),
    [
        ({}, "SwitchedSelfTraining", {}),
        ({"labeled": 2}, "SwitchedSelfTraining", {}),
        ({"labeled": 1, "common_place": None}, "Supervised", {}),
        ({"labeled": FEW_LABELED}, "SwitchedSelfTraining", {}),
        ({"labeled": FEW_LABELED + 1}, "Supervised", {}),
        ({"common_place": False}, "Supervised", {}),
        ({"common_place": None}, "Supervised", {}),
        ({"unlabeled": 0}, "Supervised", SWITCH),
        ({"unlabeled": FEWEST_UNLABELED - 1}, "Supervised", SWITCH),
        ({"unlabeled": FEWEST_UNLABELED}, "SwitchedSelfTraining", {}),
        ({"steps": FEWEST_STEPS - 1}, "Supervised", SWITCH),
    ],
)
def test_rules(changes, trainer, overrides):
    choice = choose(replace(USUAL, **changes))
    assert (choice.trainer, choice.overrides) == (trainer, overrides)
    unused = replace(USUAL, **changes).unlabeled > 0 and trainer == "Supervised"
    assert any("are not used" in reason for reason in choice.reasons) == unused


def test_every_rule_names_a_trainer_its_hyper_parameters_and_a_reason():
    assert RULES[-1].holds(USUAL)
    for rule in RULES:
        check_overrides(get_trainer(rule.trainer), rule.overrides)
        assert rule.when
        assert rule.because


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    return Tiny(labeled=3, labeled_batch=2).write(tmp_path, monkeypatch)


def plan_with(tiny, common_place):
    file = tiny.base / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    block = plans["configurations"][tiny.configuration].setdefault("semi_supervised", {})
    block["atlas_evidence"] = {"pairs": 3, "common_place": common_place}
    write_json(plans, file)


def request(**options) -> TrainingRequest:
    options = {"epochs": 1, "iterations_per_epoch": 2, "device": "cpu", "disable_memory_check": True} | options
    return TrainingRequest("901", "auto", "all", plans=PLANS, **options)


def results() -> Path:
    return engine_run.results_folder() / NAME


def test_auto_trains_what_the_rules_say_and_prediction_finds_it(tiny, capsys):
    plan_with(tiny, True)
    run(request(seed=0))
    out = capsys.readouterr().out
    assert "auto: Supervised, atlas_augmentation=regional_switch" in out
    assert "3 labeled and 3 unlabeled cases, classes at corresponding places, 2 steps" in out
    model = find_model(NAME, trainer="auto")
    assert model.folder.name.startswith("Supervised__")
    made = json.loads((model.folder / "fold_all" / "run.json").read_text())
    assert made["hyperparameters"]["atlas_augmentation"] == "regional_switch"


def test_the_choice_of_the_first_run_holds_for_the_others(tiny, capsys):
    plan_with(tiny, False)
    asked = engine_run._with_choice(request())
    assert (asked.trainer, list(asked.overrides)) == ("Supervised", [])
    plan_with(tiny, True)
    assert list(engine_run._with_choice(request()).overrides) == []
    assert "(as in" in capsys.readouterr().out
    assert list(engine_run._with_choice(request(overwrite=True)).overrides) == ["atlas_augmentation=regional_switch"]


def test_what_the_user_sets_comes_last(tiny):
    plan_with(tiny, True)
    asked = engine_run._with_choice(request(atlas_augmentation="none", overrides=["initial_lr=0.1"]))
    assert (asked.atlas_augmentation, list(asked.overrides)) == ("none", ["initial_lr=0.1"])
    asked = engine_run._with_choice(request(overrides=["atlas_augmentation=none"]))
    assert list(asked.overrides) == ["atlas_augmentation=regional_switch", "atlas_augmentation=none"]


def test_steps_may_be_given_as_hyper_parameters(tiny, capsys):
    plan_with(tiny, True)
    engine_run._with_choice(request(epochs=None, iterations_per_epoch=None, overrides=["num_epochs=3"]))
    assert "750 steps" in capsys.readouterr().out


def test_without_a_training_auto_stands_for_nothing(tiny):
    assert not auto_record(results(), PLANS, tiny.configuration).exists()
    with pytest.raises(UserError):
        find_model(NAME, trainer="auto")
