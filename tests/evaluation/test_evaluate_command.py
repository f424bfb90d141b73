from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from nnssl.cli import run

from .files import label_map, make_folders, write_labels


@pytest.mark.parametrize(("ending", "shape"), [(".nii.gz", (9, 12, 10)), (".png", (30, 40))])
def test_table_and_files(tmp_path, capsys, ending, shape):
    reference, prediction = make_folders(tmp_path, ending, shape=shape)
    write_labels(prediction / f"extra{ending}", label_map(0, shape=shape))
    arguments = ["-gt", str(reference), "-pred", str(prediction), "--nsd_tolerance", "1", "2", "-np", "1"]
    assert run("evaluate", arguments) == 0
    printed, told = capsys.readouterr()
    summary = json.loads((prediction / "summary.json").read_text())
    assert f"{summary['foreground_mean']['Dice']:.4f}" in printed
    assert "NSD@2mm" in printed
    assert "left" in printed
    assert "not evaluated: extra" in told
    assert len(pd.read_csv(prediction / "summary.csv")) == 6


def test_chosen_output_labels_and_cases(tmp_path, capsys):
    reference, prediction = make_folders(tmp_path)
    output = tmp_path / "new" / "result.json"
    arguments = ["-gt", str(reference), "-pred", str(prediction), "-o", str(output), "-np", "1"]
    assert run("evaluate", [*arguments, "-l", "1", "-il", "2", "--cases", "a", "c"]) == 0
    summary = json.loads(output.read_text())
    assert list(summary["mean"]) == ["1"]
    assert summary["ignore_label"] == 2
    assert [entry["case"] for entry in summary["metric_per_case"]] == ["a", "c"]
    assert (tmp_path / "new" / "result.csv").exists()
    assert not (prediction / "summary.json").exists()


def test_mistakes_end_with_one_message(tmp_path, capsys):
    reference, prediction = make_folders(tmp_path)
    (prediction / "b.nii.gz").unlink()
    arguments = ["-gt", str(reference), "-pred", str(prediction)]
    assert run("evaluate", arguments) == 2
    assert "none for b" in capsys.readouterr().err
    assert run("evaluate", [*arguments, "-o", str(tmp_path / "table.txt")]) == 2
    assert "must end with .json" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run("evaluate", [*arguments, "-o", str(tmp_path / "file" / "x.json")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not (prediction / "summary.json").exists()


def test_units_are_those_of_the_files(tmp_path, capsys):
    arguments = ["-gt", str(tmp_path / "gt"), "-pred", str(tmp_path / "pred"), "-np", "1"]
    make_folders(tmp_path, ".png", shape=(30, 40))
    assert run("evaluate", arguments) == 0
    printed, told = capsys.readouterr()
    assert "HD95 and ASSD in pixels. Written" in printed
    assert "no spacing is known" in told
    assert run("compare", [*(f"{name}={_copy(tmp_path, name)}" for name in "xy"), "--metric", "HD95"]) == 0
    assert "HD95 in pixels (lower is better)" in capsys.readouterr().out


def _copy(folder, name):
    (folder / name).mkdir()
    return shutil.copy(folder / "pred" / "summary.json", folder / name)


def test_a_table_of_something_else_is_kept(tmp_path, capsys):
    reference, prediction = make_folders(tmp_path)
    other = tmp_path / "my.csv"
    other.write_text("patient,age\n1,80\n")
    arguments = ["-gt", str(reference), "-pred", str(prediction), "-o", str(other.with_suffix(".json")), "-np", "1"]
    assert run("evaluate", arguments) == 2
    assert str(other) in capsys.readouterr().err
    assert other.read_text() == "patient,age\n1,80\n"
    assert not other.with_suffix(".json").exists()
    other.unlink()
    assert run("evaluate", arguments) == 0
    assert run("evaluate", arguments) == 0
    assert len(pd.read_csv(other)) == 6


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no such file system")
def test_folders_that_take_no_file_are_found_before_the_work(tmp_path, capsys, monkeypatch):
    reference, prediction = make_folders(tmp_path)
    monkeypatch.setattr("nnssl.evaluation.evaluator.evaluate_folders", pytest.fail)
    words = ["-gt", str(reference), "-pred", str(prediction), "-o", "/proc/x.json"]
    for command in (
        ("evaluate", *words),
        ("compare", "a", "b", "-o", "/proc/x.csv"),
        ("report", "a", "-o", "/proc/x.html"),
    ):
        assert run(command[0], command[1:]) == 2
        assert "output folder cannot be written to" in capsys.readouterr().err


def test_paths_in_the_summary_lead_to_the_files_from_everywhere(tmp_path, monkeypatch):
    reference, prediction = make_folders(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert run("evaluate", ["-gt", "gt", "-pred", "pred", "-np", "1"]) == 0
    entry = json.loads((prediction / "summary.json").read_text())["metric_per_case"][0]
    assert entry["reference_file"] == str(reference / "a.nii.gz")
    assert entry["prediction_file"] == str(prediction / "a.nii.gz")


@pytest.mark.parametrize("flags", [[], ["-u"]], ids=["buffered", "unbuffered"])
def test_a_reader_that_leaves_early(tmp_path, flags):
    """As in ``nnssl_trainers | head -0``."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, *flags, "-m", "nnssl", "trainers"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_from_the_shell_with_two_processes(tmp_path):
    reference, prediction = make_folders(tmp_path, cases=2)
    command = [sys.executable, "-m", "nnssl", "evaluate", "-gt", str(reference), "-pred", str(prediction), "-np", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "foreground mean" in done.stdout
    assert "Traceback" not in done.stderr


def test_help_does_not_load_the_library():
    code = (
        "import sys\nfrom nnssl.cli import run\n"
        "try:\n    run('evaluate', ['--help'])\n"
        "finally:\n    assert not {'torch', 'nnunetv2', 'pandas', 'scipy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--nsd_tolerance" in done.stdout
