from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK

import nnssl.benchmark.demo as demo
from nnssl.benchmark.demo_plan import DemoSettings, training_folder
from nnssl.dataset.phantom import make_phantom_dataset
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError


class Commands:
    """Stands in for the real commands: notes their words and writes what they would."""

    def __init__(self, settings: DemoSettings):
        self.settings = settings
        self.seen: list[list[str]] = []
        self.interrupt_training = False

    def __call__(self, words, environment):
        assert set(environment) == {"nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"}
        self.seen.append(list(words))
        getattr(self, words[0])(words)

    def plan_and_preprocess(self, words):
        assert (self.settings.raw / "imagesUn").is_dir()

    def train(self, words):
        folder = training_folder(self.settings, words[2], "3d_fullres")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "checkpoint_latest.pth").touch()
        if not self.interrupt_training:
            (folder / "checkpoint_final.pth").touch()

    def predict(self, words):
        folder = Path(words[words.index("-o") + 1])
        folder.mkdir(parents=True)
        for label in (self.settings.raw / "labelsTs").iterdir():
            SimpleITK.WriteImage(SimpleITK.ReadImage(str(label)) * 0, str(folder / label.name))

    def evaluate(self, words):
        means = {"Dice": 0.25, "HD95": 12.5, "failures": 3}
        metrics = {"1": {"Dice": 0.5}, "2": {"Dice": 0.0}, "3": {"Dice": float("nan")}}
        cases = [{"case": f"phantom_{index:03d}", "metrics": metrics} for index in range(27, 33)]
        summary = {"foreground_mean": means, "metric_per_case": cases}
        Path(words[words.index("-o") + 1]).write_text(json.dumps(summary))


@pytest.fixture
def settings(tmp_path) -> DemoSettings:
    return DemoSettings(output=tmp_path / "out", epochs=1, iterations_per_epoch=2)


@pytest.fixture
def commands(settings, monkeypatch) -> Commands:
    stand_in = Commands(settings)
    monkeypatch.setattr(demo, "run_command", stand_in)
    return stand_in


def test_whole_way_and_a_second_run(settings, commands):
    result = demo.run_demo(settings)
    names = [words[0] for words in commands.seen]
    assert names == ["plan_and_preprocess", *["train", "predict", "evaluate"] * 2]
    assert [row.trainer for row in result.rows] == ["Supervised", "MeanTeacher"]
    assert [(row.dice, row.hd95, row.failures) for row in result.rows] == [(0.25, 12.5, 3)] * 2
    assert result.overlay.stat().st_size > 10_000
    assert demo._case_dice(settings, "MeanTeacher")["phantom_028"] == 0.25
    dataset = RawDataset.open(settings.raw)
    assert [len(part) for part in (dataset.labeled, dataset.unlabeled, dataset.test)] == [3, 24, 6]
    table = str(result).splitlines()
    assert table[1].split() == ["Supervised", "0.250", "12.50", "3", "0.0"]
    assert "3 labeled cases and 2 iterations" in str(result)
    assert "no benchmark" in str(result)
    again = demo.run_demo(settings)
    assert len(commands.seen) == len(names)
    assert again.rows == result.rows


def test_an_interrupted_training_is_continued(settings, commands):
    commands.interrupt_training = True
    with pytest.raises(UserError, match="stopped before its end"):
        demo.run_demo(settings)
    commands.interrupt_training = False
    demo.run_demo(settings)
    first, second = [words for words in commands.seen if words[:3] == ["train", "1", "Supervised"]]
    assert second == [*first, "--c"]
    assert [words[0] for words in commands.seen].count("plan_and_preprocess") == 1


def test_data_left_by_a_run_that_was_killed_is_replaced(settings, commands):
    make_phantom_dataset(settings.raw, labeled=1, unlabeled=1, test=1, shape=(16, 16, 16))
    (settings.folder / "demo.json").write_text(json.dumps({"settings": settings.to_json(), "seconds": {}}))
    demo.run_demo(settings)
    assert len(RawDataset.open(settings.raw).labeled) == 3


def test_a_missing_source_is_reported_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        demo.run_demo(DemoSettings(output=tmp_path / "out", data=tmp_path / "nothing"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("dimensions", "expected"), [(2, "2d"), (3, "3d_fullres")])
def test_configuration_follows_from_the_images(tmp_path, dimensions, expected):
    sizes = {2: (32, 32), 3: (16, 16, 16)}
    folder = make_phantom_dataset(
        tmp_path / "Dataset001_A", labeled=1, unlabeled=1, test=0, shape=sizes[dimensions], dimensions=dimensions
    )
    assert demo.find_configuration(RawDataset.open(folder)) == expected


@pytest.mark.slow
def test_real_commands_on_a_folder_of_images_and_labels(tmp_path):
    raw = make_phantom_dataset(tmp_path / "Dataset001_A", labeled=8, unlabeled=0, test=0, shape=(20, 24, 24))
    (raw / "labelsTr").rename(tmp_path / "labels")
    (raw / "imagesTr").rename(tmp_path / "images")
    for image in (tmp_path / "images").iterdir():
        image.rename(image.with_name(image.name.replace("_0000", "")))
    command = [sys.executable, "-m", "nnssl", "demo", "-o", "out", "--data", ".", "--trainers", "MeanTeacher"]
    command += ["--epochs", "1", "--iterations-per-epoch", "2", "-device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "MeanTeacher" in result.stdout.splitlines()[-4]
    assert (tmp_path / "out" / "overlay.png").is_file()
    assert len(list((tmp_path / "out" / "predictions" / "MeanTeacher").glob("*.nii.gz"))) == 1
    assert len(list((tmp_path / "out" / "nnUNet_raw").glob("*/labelsTr/*"))) == 3
