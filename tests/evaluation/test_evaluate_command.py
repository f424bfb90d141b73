from __future__ import annotations

import json
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
