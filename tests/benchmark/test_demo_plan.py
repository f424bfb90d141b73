"""Each command line of the demo is read by the parser of that command, so that both stay in step."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path

import pytest

from nnssl.benchmark.demo_plan import (
    DemoSettings,
    evaluate_words,
    plan_words,
    predict_words,
    split_words,
    train_words,
    training_folder,
)
from nnssl.errors import UserError
from nnssl.trainers.engine.settings import parse_overrides
from nnssl.trainers.mean_teacher import MeanTeacher


def parse(words: list[str]) -> argparse.Namespace:
    return importlib.import_module(f"nnssl.cli.{words[0]}")._parser().parse_args(words[1:])


@pytest.fixture
def settings(tmp_path) -> DemoSettings:
    return DemoSettings(output=tmp_path / "out", epochs=3, iterations_per_epoch=7, seed=4)


@pytest.fixture
def images_and_labels(tmp_path) -> Path:
    folder = tmp_path / "my data"
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
        for case in range(12):
            (folder / name / f"case{case}.nii.gz").touch()
    return folder


def test_plan(settings):
    found = parse(plan_words(settings, "2d"))
    assert (found.d, found.pl, found.c, found.np) == (["1"], "nnSSLPlannerCPU", ["2d"], [2])
    on_gpu = DemoSettings(output=settings.output, device="cuda")
    assert parse(plan_words(on_gpu, "3d_fullres")).pl == "nnSSLPlanner"


def test_train(settings):
    found = parse(train_words(settings, "MeanTeacher", "3d_fullres"))
    assert (found.trainer, found.fold, found.c, found.p) == ("MeanTeacher", "all", "3d_fullres", "nnSSLCPUPlans")
    assert (found.epochs, found.iterations_per_epoch, found.seed, found.device) == (3, 7, 4, "cpu")
    assert not found.resume
    assert parse_overrides(MeanTeacher, found.set)["num_val_iterations_per_epoch"] == 2


def test_settings_of_the_user_come_last(tmp_path):
    settings = DemoSettings(output=tmp_path, overrides=("initial_lr=0.1",))
    found = parse(train_words(settings, "MeanTeacher", "2d"))
    assert parse_overrides(MeanTeacher, found.set)["initial_lr"] == 0.1


def test_train_predict_and_evaluate_agree_on_the_folders(settings):
    predict = parse(predict_words(settings, "Supervised", "3d_fullres"))
    evaluate = parse(evaluate_words(settings, "Supervised"))
    assert (predict.tr, predict.f, predict.d) == ("Supervised", ["all"], "1")
    assert predict.i == [settings.raw / "imagesTs"]
    assert Path(evaluate.pred) == predict.o
    assert Path(evaluate.gt) == settings.raw / "labelsTs"
    assert Path(evaluate.o).parent == predict.o
    folder = training_folder(settings, "Supervised", "3d_fullres")
    assert folder.relative_to(settings.folder).parts == (
        "nnUNet_results",
        "Dataset001_Phantom",
        "Supervised__nnSSLCPUPlans__3d_fullres",
        "fold_all",
    )


def test_split_of_a_folder_without_test_part(tmp_path, images_and_labels):
    settings = DemoSettings(output=tmp_path / "out", data=images_and_labels, labeled=4, seed=2)
    found = parse(split_words(settings, images_and_labels))
    assert (found.source, found.d, found.n) == (str(images_and_labels), 1, "my_data")
    assert (found.labeled, found.seed, found.test, found.channel_names) == (4, 2, 2, ["image"])
    assert Path(found.hidden_labels) / "test" == settings.test_labels


def test_split_keeps_the_test_part_and_the_channel_names_that_there_are(tmp_path, images_and_labels):
    (images_and_labels / "split.json").write_text(json.dumps({"train": ["case0"], "test": ["case1"]}))
    settings = DemoSettings(output=tmp_path / "out", data=images_and_labels, channel_names=("CT",))
    found = parse(split_words(settings, images_and_labels))
    assert (found.test, found.channel_names) == (0, ["CT"])


def test_split_of_photographs_and_of_a_raw_data_set_names_no_channels(tmp_path):
    photos, raw = tmp_path / "photos", tmp_path / "Dataset005_X"
    for folder in (photos / "images", photos / "labels", raw / "labelsTr", raw / "labelsTs"):
        folder.mkdir(parents=True)
    (photos / "images" / "a.png").touch()
    (photos / "labels" / "a.png").touch()
    (raw / "dataset.json").write_text("{}")
    (raw / "labelsTs" / "a.nii.gz").touch()
    found = [parse(split_words(DemoSettings(output=tmp_path, data=data), data)) for data in (photos, raw)]
    assert [args.channel_names for args in found] == [None, None]
    assert [args.test for args in found] == [1, 0]


@pytest.mark.parametrize("wrong", [{"labeled": 0}, {"epochs": 0}, {"trainers": ()}, {"trainers": ("A", "A")}])
def test_wrong_settings(tmp_path, wrong):
    with pytest.raises(UserError, match="settings of the demo"):
        DemoSettings(output=tmp_path, **wrong)


def test_record_does_not_depend_on_where_the_demo_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = DemoSettings(output=Path("a"), data=Path("data")).to_json()
    assert here == DemoSettings(output=Path("b"), data=tmp_path / "data", processes=7).to_json()
    assert here == json.loads(json.dumps(here))
