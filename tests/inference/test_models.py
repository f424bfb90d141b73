from __future__ import annotations

from pathlib import Path

import pytest

from nnssl.errors import UserError
from nnssl.inference.models import find_model, open_model

NAME = "Dataset901_Tiny"


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    (tmp_path / NAME).mkdir()
    return tmp_path


def add(results: Path, model: str, *folds: str, checkpoint: str = "checkpoint_final.pth") -> Path:
    folder = results / NAME / model
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("plans.json", "dataset.json"):
        (folder / name).write_text("{}")
    for fold in folds:
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        (folder / f"fold_{fold}" / checkpoint).touch()
    return folder


def test_the_only_trainer_is_taken(results):
    add(results, "MeanTeacher__nnSSLPlans__3d_fullres", "0")
    add(results, "Supervised__nnSSLPlans__3d_fullres", "0", checkpoint="checkpoint_latest.pth")
    assert find_model(901).folder.name == "MeanTeacher__nnSSLPlans__3d_fullres"


def test_two_trainers_are_listed(results):
    add(results, "MeanTeacher__nnSSLPlans__3d_fullres", "0")
    add(results, "Supervised__nnSSLPlans__3d_fullres", "0")
    with pytest.raises(UserError, match="more than one") as caught:
        find_model(901)
    assert "MeanTeacher__nnSSLPlans__3d_fullres" in str(caught.value)
    assert "-tr: MeanTeacher, Supervised" in str(caught.value)
    assert find_model(901, trainer="Supervised").folder.name == "Supervised__nnSSLPlans__3d_fullres"


@pytest.mark.parametrize(
    ("trained", "expected"),
    [
        (["nnUNetPlans__2d", "nnSSLPlans__2d"], "nnSSLPlans__2d"),
        (["nnUNetPlans__2d"], "nnUNetPlans__2d"),
        (["nnSSLPlans__2d", "nnSSLPlans__3d_lowres", "nnSSLPlans__3d_fullres"], "nnSSLPlans__3d_fullres"),
        (["nnSSLPlans__2d", "nnSSLPlans__3d_lowres"], "nnSSLPlans__2d"),
        (["nnSSLPlans__3d_lowres"], "nnSSLPlans__3d_lowres"),
    ],
)
def test_default_plans_and_configuration(results, trained, expected):
    for name in trained:
        add(results, f"Supervised__{name}", "0")
    assert find_model(901).folder.name == f"Supervised__{expected}"


@pytest.mark.parametrize(
    ("trained", "flag"),
    [(["APlans__2d", "BPlans__2d"], "-p"), (["nnSSLPlans__3d_lowres", "nnSSLPlans__3d_cascade_fullres"], "-c")],
)
def test_undecided_plans_or_configuration(results, trained, flag):
    for name in trained:
        add(results, f"Supervised__{name}", "0")
    with pytest.raises(UserError, match=f"choose with {flag}"):
        find_model(901)


def test_no_model_matches(results):
    add(results, "Supervised__nnSSLPlans__3d_fullres", "0")
    add(results, "MeanTeacher__nnSSLPlans__3d_fullres", "0", checkpoint="checkpoint_latest.pth")
    with pytest.raises(UserError, match="no trained model with trainer MeanTeacher") as caught:
        find_model(901, trainer="MeanTeacher")
    assert "Supervised__nnSSLPlans__3d_fullres" in str(caught.value)
    assert "MeanTeacher__nnSSLPlans__3d_fullres (no fold has checkpoint_final.pth)" in str(caught.value)


def test_nothing_is_trained(results):
    with pytest.raises(UserError, match="no trained model"):
        find_model(NAME)


def test_all_finished_numbered_folds_are_taken_in_order(results):
    folder = add(results, "Supervised__nnSSLPlans__2d", "10", "2", "0", "all")
    add(results, folder.name, "1", checkpoint="checkpoint_latest.pth")
    model = open_model(folder)
    assert model.folds == ("0", "2", "10")
    assert model.unfinished == ("1",)
    assert "folds 0 2 10" in str(model)
    assert "left out: 1" in str(model)


def test_fold_all_is_taken_if_it_is_the_only_one(results):
    assert open_model(add(results, "Supervised__nnSSLPlans__2d", "all")).folds == ("all",)


def test_named_folds(results):
    folder = add(results, "Supervised__nnSSLPlans__2d", "0", "1", "all")
    assert open_model(folder, folds=["1", "01", "all"]).folds == ("1", "all")
    with pytest.raises(UserError, match="in fold 3") as caught:
        open_model(folder, folds=["0", "3"])
    assert "0 1 all" in str(caught.value)
    with pytest.raises(UserError, match="not a fold"):
        open_model(folder, folds=["first"])


def test_another_checkpoint(results):
    folder = add(results, "Supervised__nnSSLPlans__2d", "0", checkpoint="checkpoint_best.pth")
    assert find_model(901, checkpoint="checkpoint_best.pth").checkpoint_files() == [
        folder / "fold_0" / "checkpoint_best.pth"
    ]
    with pytest.raises(UserError, match="no fold of the model has") as caught:
        open_model(folder)
    assert "unfinished folds: 0" in str(caught.value)


def test_folders_that_are_no_models(results):
    with pytest.raises(UserError, match="not found"):
        open_model(results / "nothing")
    with pytest.raises(UserError, match="not a model folder"):
        open_model(results / NAME)
