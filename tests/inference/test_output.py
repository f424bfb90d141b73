"""The folder of the masks: what goes with masks that are replaced, and what a continued prediction may keep."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nnssl.cli import run as run_command
from nnssl.errors import UserError
from nnssl.inference.contents import checkpoint_content, file_content
from nnssl.inference.models import open_model
from nnssl.inference.output import RECORD
from nnssl.inference.run import PredictionOptions, PredictionReport, predict
from nnssl.utils.files import write_json
from tests.inference.model_folders import change_checkpoint, read_mask, write_model, write_scan
from tests.support.tiny import Tiny

HERE = {"device": "cpu", "precision": "fp32", "preprocessing_workers": 0, "export_workers": 0, "progress": False}


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "results", folds=(0, 1))


@pytest.fixture
def scans(tmp_path) -> Path:
    for number, name in enumerate("ab"):
        write_scan(tmp_path / "in" / f"{name}_0000.nii.gz", seed=number)
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def run(model: Path, *inputs: Path, output: Path, fold="0", **options) -> PredictionReport:
    return predict(inputs, output, open_model(model, folds=[fold]), PredictionOptions(**HERE | options))


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def record(folder: Path) -> dict:
    return json.loads((folder / RECORD).read_text())


def evaluate(output: Path, *cases: str) -> None:
    labels = output.parent / "labels"
    labels.mkdir(exist_ok=True)
    for case in cases or ("a", "b"):
        shutil.copy(output / f"{case}.nii.gz", labels)
    assert run_command("evaluate", ["-gt", str(labels), "-pred", str(output), "-l", "1", "-np", "1"]) == 0


PLAIN = {"a.nii.gz", "b.nii.gz", "dataset.json", "plans.json", RECORD}


def test_what_belongs_to_replaced_masks_goes_with_them(model, scans, out, capsys):
    run(model, scans, output=out, save_probabilities=True, save_uncertainty=True)
    evaluate(out)
    assert {"summary.json", "summary.csv", "a.npz", "a.pkl", "uncertainty/a_entropy.nii.gz"} <= files(out)
    capsys.readouterr()
    run(model, scans, output=out, fold="1")
    assert files(out) == PLAIN
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Removed")]
    assert told == "Removed with the earlier masks: summary.json, summary.csv, a.npz, a.pkl, b.npz and 6 more"
    run(model, scans, output=out, fold="1")
    assert "Removed" not in capsys.readouterr().out


def test_what_belongs_to_other_masks_stays(model, scans, out):
    run(model, scans, output=out, save_uncertainty=True, save_probabilities=True)
    evaluate(out, "a")
    run(model, scans / "b_0000.nii.gz", output=out)
    expected = {"summary.json", "summary.csv", "a.npz", "a.pkl"}
    expected |= {f"uncertainty/{name}" for name in ("a.json", "a_entropy.nii.gz", "quality.csv")}
    assert files(out) == PLAIN | expected
    assert pd.read_csv(out / "uncertainty" / "quality.csv")["case"].tolist() == ["a"]
    run(model, scans / "a_0000.nii.gz", output=out)
    assert files(out) == PLAIN


def test_files_of_others_stay(model, scans, out):
    run(model, scans, output=out)
    np.savez(out / "a.npz", features=np.zeros(3))
    (out / "a.pkl").write_bytes(b"of a radiologist")
    write_json({"patients": 2}, out / "summary.json")
    (out / "summary.csv").write_text("patient,age\n1,30\n")
    before = files(out)
    run(model, scans, output=out)
    assert files(out) == before
    write_json({"metric_per_case": [{"prediction_file": str(out / "a.nii.gz")}]}, out / "summary.json")
    run(model, scans, output=out)
    assert files(out) == before - {"summary.json"}
    assert (out / "summary.csv").read_text() == "patient,age\n1,30\n"


def test_masks_of_other_cases_by_another_model_are_refused(model, scans, out):
    run(model, scans, output=out)
    before = {name: (out / name).read_bytes() for name in files(out)}
    one = scans / "b_0000.nii.gz"
    with pytest.raises(UserError, match="holds 1 mask of other cases, made in another way") as caught:
        run(model, one, output=out, fold="1")
    assert str(out) in str(caught.value)
    assert "other cases: a.nii.gz" in str(caught.value)
    write_scan(scans.parent / "new" / "c_0000.nii.gz")
    for continues in (False, True):
        with pytest.raises(UserError, match="choose another folder with -o"):
            run(model, scans.parent / "new", output=out, fold="1", continue_prediction=continues)
    assert {name: (out / name).read_bytes() for name in files(out)} == before
    # by the same model, or all cases by another one
    assert run(model, one, output=out).written == ["b"]
    assert run(model, scans, output=out, fold="1").written == ["a", "b"]


def test_masks_of_a_prediction_that_recorded_no_model(model, scans, out):
    run(model, scans, output=out)
    write_json({"dataset": "Dataset001_Data", "fusion": "local"}, out / RECORD)
    with pytest.raises(UserError, match="model_folder not recorded"):
        run(model, scans, output=out, continue_prediction=True)
    assert run(model, scans, output=out).written == ["a", "b"]


def test_a_changed_scan_is_predicted_again(model, scans, out, tmp_path, capsys):
    run(model, scans, output=out)
    shutil.copytree(scans, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "a_0000.nii.gz")
    assert run(model, tmp_path / "copy", output=out, continue_prediction=True).written == []
    write_scan(tmp_path / "other" / "a_0000.nii.gz", seed=7)
    shutil.copy(scans / "b_0000.nii.gz", tmp_path / "other")
    capsys.readouterr()
    assert run(model, tmp_path / "other", output=out, continue_prediction=True).written == ["a"]
    assert "a: is predicted again, since its mask was made from another scan" in capsys.readouterr().out
    run(model, tmp_path / "other", output=tmp_path / "fresh")
    np.testing.assert_array_equal(*(read_mask(folder / "a.nii.gz") for folder in (out, tmp_path / "fresh")))
    assert run(model, tmp_path / "other", output=out, continue_prediction=True).skipped == ["a", "b"]


def test_a_changed_mask_of_the_first_stage(tmp_path, scans, out):
    tiny = Tiny(cascade=True)
    model = write_model(tmp_path / "results", tiny)
    for stage, seed in (("one", 0), ("two", 1)):
        write_scan(tmp_path / stage / "a.nii.gz", seed=seed)
        write_scan(tmp_path / stage / "b.nii.gz", seed=0)
    run(model, scans, output=out, previous_stage=tmp_path / "one")
    again = {"output": out, "continue_prediction": True}
    assert run(model, scans, previous_stage=tmp_path / "one", **again).written == []
    assert run(model, scans, previous_stage=tmp_path / "two", **again).written == ["a"]


def test_parts_remember_the_scans_of_each_other(model, scans, out):
    for part in (0, 1):
        run(model, scans, output=out, num_parts=2, part_id=part)
    before = record(out)["cases"]
    assert set(before) == {"a", "b"}
    write_scan(scans / "a_0000.nii.gz", seed=8)
    write_scan(scans / "b_0000.nii.gz", seed=9)
    run(model, scans, output=out, num_parts=2, part_id=0)
    after = record(out)["cases"]
    assert (after["a"] != before["a"], after["b"]) == (True, before["b"])
    assert run(model, scans, output=out, continue_prediction=True).written == ["b"]


def test_another_checkpoint_of_the_same_name_is_refused(model, scans, out):
    run(model, scans, output=out)
    (out / "b.nii.gz").unlink()
    os.utime(model / "fold_0" / "checkpoint_final.pth")
    weights = write_model(out.parent / "other", folds=(1,)) / "fold_1" / "checkpoint_final.pth"
    kept = (model / "fold_0" / "checkpoint_final.pth").read_bytes()
    shutil.copy(weights, model / "fold_0" / "checkpoint_final.pth")
    with pytest.raises(UserError, match="cannot be continued") as caught:
        run(model, scans, output=out, continue_prediction=True)
    assert "checkpoint_contents" in str(caught.value)
    (model / "fold_0" / "checkpoint_final.pth").write_bytes(kept)
    assert run(model, scans, output=out, continue_prediction=True).written == ["b"]


def test_another_number_format_is_refused(model, scans, out):
    run(model, scans, output=out)
    with pytest.raises(UserError, match="precision fp32"):
        run(model, scans, output=out, continue_prediction=True, precision="bf16")


def test_folders_of_earlier_versions_are_continued(model, scans, out):
    run(model, scans, output=out)
    write_json({k: v for k, v in record(out).items() if k not in ("cases", "checkpoint_contents")}, out / RECORD)
    (out / "b.nii.gz").unlink()
    write_scan(scans / "a_0000.nii.gz", seed=5)
    report = run(model, scans, output=out, continue_prediction=True)
    assert (report.written, report.skipped) == (["b"], ["a"])
    assert set(record(out)["cases"]) == {"b"}


def test_a_mask_that_no_prediction_wrote_is_not_replaced(model, scans, out):
    write_scan(out / "a.nii.gz")
    content = (out / "a.nii.gz").read_bytes()
    with pytest.raises(UserError, match="that no prediction wrote"):
        run(model, scans, output=out, continue_prediction=True, save_probabilities=True)
    assert (out / "a.nii.gz").read_bytes() == content


def test_the_table_of_a_killed_run_is_made_by_the_next(model, scans, out, capsys):
    run(model, scans, output=out, save_uncertainty=True)
    (out / "uncertainty" / "quality.csv").unlink()
    capsys.readouterr()
    report = run(model, scans, output=out, save_uncertainty=True, continue_prediction=True)
    assert report.written == []
    assert "quality.csv" in capsys.readouterr().out
    assert len(pd.read_csv(out / "uncertainty" / "quality.csv")) == 2


def test_a_damaged_record_is_named(model, scans, out):
    run(model, scans, output=out)
    (out / RECORD).write_text("{")
    with pytest.raises(UserError, match="not valid JSON") as caught:
        run(model, scans, output=out)
    assert RECORD in str(caught.value)


def test_contents_of_files(tmp_path, model):
    packed = write_scan(tmp_path / "a.nii.gz")
    shutil.copy(packed, tmp_path / "b.nii.gz")
    assert file_content(packed) == file_content(tmp_path / "b.nii.gz")
    assert file_content(packed) != file_content(write_scan(tmp_path / "c.nii.gz", seed=1))
    plain = write_scan(tmp_path / "a.nii")
    before = file_content(plain)
    os.utime(plain, ns=(1, 1))
    assert file_content(plain) != before
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    before = checkpoint_content(checkpoint)
    shutil.copy(checkpoint, tmp_path / "copy.pth")
    assert checkpoint_content(tmp_path / "copy.pth") == before
    change_checkpoint(model, current_epoch=2)
    assert checkpoint_content(checkpoint) != before
    checkpoint.write_bytes(b"no archive")
    assert checkpoint_content(checkpoint) == "10 bytes"
