from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nnssl.dataloading.cases import UnreadableCase
from nnssl.errors import UserError
from nnssl.trainers.engine.cascade import check_first_stage
from nnssl.trainers.engine.validation import validation_cases
from tests.support.tiny import PLANS, Tiny

FIRST_STAGE = f"nnssl_train Dataset901_Tiny Supervised FOLD -c 3d_lowres -p {PLANS} "


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    yield Tiny(cascade=True).write(tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(False)


def first_stage(tiny, fold):
    trainer = tiny.bare_trainer("Supervised", fold, "3d_lowres")
    trainer.initialize()
    trainer.perform_actual_validation()
    return trainer


def test_a_next_stage_that_is_not_preprocessed_is_left_out_and_told(tiny, capsys):
    file = tiny.base / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["data_identifier"] = "not_made"
    file.write_text(json.dumps(plans))
    trainer = first_stage(tiny, 0)
    out = capsys.readouterr().out
    assert "WARNING: nothing is predicted for the next stage, 3d_cascade_fullres: 1 of 1 cases" in out
    assert "nnssl_plan_and_preprocess -d Dataset901_Tiny -c 3d_fullres" in out
    assert f"nnssl_train Dataset901_Tiny Supervised 0 -c 3d_lowres -p {PLANS} --val" in out
    assert Path(trainer.output_folder, "validation", "summary.json").is_file()
    assert not Path(trainer.output_folder_base, "predicted_next_stage").exists()


def test_missing_predictions_of_the_first_stage_are_told_before_a_training(tiny):
    trainer = tiny.bare_trainer("Supervised", fold=0)
    with pytest.raises(UserError, match="has predicted 0 of 2 labeled cases") as caught:
        check_first_stage(trainer)
    assert caught.value.where == trainer.folder_with_segs_from_previous_stage
    assert caught.value.found == "none of labeled_0, labeled_1"
    assert caught.value.fix.startswith(FIRST_STAGE)
    first_stage(tiny, 0)
    with pytest.raises(UserError, match="has predicted 1 of 2 labeled cases"):
        check_first_stage(trainer)
    first_stage(tiny, 1)
    check_first_stage(trainer)
    check_first_stage(tiny.bare_trainer("Supervised", fold=0, configuration="3d_lowres"))


def test_a_case_without_prediction_of_the_first_stage_is_named(tiny):
    trainer = tiny.bare_trainer("Supervised", fold=0)
    trainer.initialize()
    with pytest.raises(UnreadableCase, match="first stage of the cascade has not predicted case labeled_1") as caught:
        validation_cases(trainer, ["labeled_1"]).load_case("labeled_1")
    text = str(caught.value)
    assert FIRST_STAGE in text
    assert "nnssl_plan_and_preprocess" not in text
    assert "\n" not in text, "a stream tells the last line of what its worker raised"


def test_a_broken_case_of_a_second_stage_is_made_by_preprocessing(tiny):
    first_stage(tiny, 0)
    trainer = tiny.bare_trainer("Supervised", fold=0)
    trainer.initialize()
    (tiny.base / tiny.identifier / "labeled_0.b2nd").write_bytes(b"no array")
    with pytest.raises(UnreadableCase, match=r"case labeled_0 cannot be read .* nnssl_plan_and_preprocess again"):
        validation_cases(trainer, ["labeled_0"]).load_case("labeled_0")
