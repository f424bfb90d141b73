from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl.errors import UserError
from nnssl.inference import pipeline, workers
from nnssl.inference.models import open_model
from nnssl.inference.output import RECORD
from nnssl.inference.run import PredictionOptions, PredictionReport, predict
from nnssl.utils.files import write_json
from tests.inference.model_folders import read_mask, write_model, write_scan
from tests.support.tiny import Tiny

HERE = {"device": "cpu", "precision": "fp32", "preprocessing_workers": 0, "export_workers": 0, "progress": False}


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "results")


@pytest.fixture
def scans(tmp_path) -> Path:
    for number, name in enumerate("abc"):
        write_scan(tmp_path / "in" / f"{name}_0000.nii.gz", seed=number)
    return tmp_path / "in"


def run(model: Path, *inputs: Path, output: Path, folds=None, **options) -> PredictionReport:
    return predict(inputs, output, open_model(model, folds=folds), PredictionOptions(**HERE | options))


def masks(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.nii.gz"))


def stock_masks(model: Path, scans: Path, output: Path, monkeypatch, folds=(0,)) -> None:
    monkeypatch.setattr(predict_from_raw_data, "recursive_find_trainer_class_by_name", lambda name: nnUNetTrainer)
    predictor = predict_from_raw_data.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds)
    output.mkdir()
    files = sorted(scans.iterdir())
    predictor.predict_from_files_sequential([[str(f)] for f in files], str(output), save_probabilities=True)


def test_folder_as_by_stock(model, scans, tmp_path, monkeypatch):
    report = run(model, scans, output=tmp_path / "out", save_probabilities=True, memory_format="contiguous")
    stock_masks(model, scans, tmp_path / "stock", monkeypatch)
    assert report.written == ["a", "b", "c"]
    assert masks(tmp_path / "out") == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    for name in "abc":
        found, expected = (tmp_path / folder / f"{name}.nii.gz" for folder in ("out", "stock"))
        assert found.read_bytes() == expected.read_bytes()
        probabilities = [
            np.load(path.with_suffix("").with_suffix(".npz"))["probabilities"] for path in (found, expected)
        ]
        assert np.array_equal(*probabilities)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "stock").iterdir()
    )
    assert read_mask(tmp_path / "out" / "a.nii.gz").shape == (20, 16, 14)
    assert set(np.unique(read_mask(tmp_path / "out" / "a.nii.gz"))) == {0, 1}


def test_folds_are_averaged(tmp_path, scans, monkeypatch):
    model = write_model(tmp_path / "results", folds=(0, 1))
    run(model, scans, output=tmp_path / "both")
    run(model, scans, output=tmp_path / "first", folds=["0"])
    stock_masks(model, scans, tmp_path / "stock", monkeypatch, folds=(0, 1))
    assert (tmp_path / "both" / "a.nii.gz").read_bytes() == (tmp_path / "stock" / "a.nii.gz").read_bytes()
    assert (tmp_path / "both" / "a.nii.gz").read_bytes() != (tmp_path / "first" / "a.nii.gz").read_bytes()


def test_names_without_channel_and_single_files(model, scans, tmp_path):
    run(model, scans, output=tmp_path / "out")
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in "abc":
        shutil.copy(scans / f"{name}_0000.nii.gz", plain / f"{name}.nii.gz")
    run(model, plain, output=tmp_path / "of_plain")
    assert masks(tmp_path / "of_plain") == masks(tmp_path / "out")
    run(model, plain / "b.nii.gz", output=tmp_path / "of_file")
    assert masks(tmp_path / "of_file") == ["b.nii.gz"]
    expected = (tmp_path / "out" / "b.nii.gz").read_bytes()
    assert (tmp_path / "of_plain" / "b.nii.gz").read_bytes() == expected
    assert (tmp_path / "of_file" / "b.nii.gz").read_bytes() == expected


def test_two_dimensions(tmp_path):
    model = write_model(tmp_path / "results", Tiny(dimensions=2), mirroring=(0, 1))
    write_scan(tmp_path / "in" / "volume_0000.nii.gz", shape=(3, 20, 24))
    write_scan(tmp_path / "in" / "slice_0000.nii.gz", shape=(20, 24))
    run(model, tmp_path / "in", output=tmp_path / "out")
    assert read_mask(tmp_path / "out" / "volume.nii.gz").shape == (3, 20, 24)
    assert read_mask(tmp_path / "out" / "slice.nii.gz").shape == (20, 24)


def test_cascade(tmp_path, scans):
    tiny = Tiny(cascade=True)
    model = write_model(tmp_path / "results", tiny)
    with pytest.raises(UserError, match="needs the masks of the first"):
        run(model, scans, output=tmp_path / "out")
    stage = tmp_path / "lowres"
    run(write_model(tmp_path / "results", tiny, configuration="3d_lowres"), scans, output=stage)
    run(model, scans, output=tmp_path / "out", previous_stage=stage)
    assert masks(tmp_path / "out") == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
    (stage / "b.nii.gz").unlink()
    with pytest.raises(UserError, match=r"b\.nii\.gz"):
        run(model, scans, output=tmp_path / "other", previous_stage=stage)


def test_continue_leaves_finished_cases_alone(model, scans, tmp_path):
    out = tmp_path / "out"
    run(model, scans, output=out)
    (out / "b.nii.gz").unlink()
    kept = (out / "a.nii.gz").stat().st_mtime_ns
    report = run(model, scans, output=out, continue_prediction=True)
    assert report.written == ["b"]
    assert report.skipped == ["a", "c"]
    assert (out / "a.nii.gz").stat().st_mtime_ns == kept
    assert "2 were there already" in str(report)
    with_probabilities = run(model, scans, output=out, continue_prediction=True, save_probabilities=True)
    assert with_probabilities.written == ["a", "b", "c"]
    assert run(model, scans, output=out, continue_prediction=True, save_probabilities=True).written == []


def test_without_continue_everything_is_predicted_again(model, scans, tmp_path):
    run(model, scans, output=tmp_path / "out")
    assert run(model, scans, output=tmp_path / "out").written == ["a", "b", "c"]


def test_a_stopped_second_run_leaves_no_masks_of_the_first(model, scans, tmp_path, monkeypatch):
    run(model, scans, output=tmp_path / "out")

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "export_case", stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, scans, output=tmp_path / "out")
    assert masks(tmp_path / "out") == []


def test_continue_with_another_model_is_refused(tmp_path, scans):
    model = write_model(tmp_path / "results", folds=(0, 1))
    run(model, scans, output=tmp_path / "out", folds=["0"])
    with pytest.raises(UserError, match="cannot be continued") as caught:
        run(model, scans, output=tmp_path / "out", folds=["1"], continue_prediction=True)
    assert "folds ['0']" in str(caught.value)
    run(model, scans, output=tmp_path / "out", folds=["1"])


def test_parts_share_the_cases(model, scans, tmp_path):
    first = run(model, scans, output=tmp_path / "out", num_parts=2, part_id=0)
    second = run(model, scans, output=tmp_path / "out", num_parts=2, part_id=1)
    assert (first.written, second.written) == (["a", "c"], ["b"])


def damage(file: Path) -> bytes:
    """Changes bytes in the middle, which no header shows; returns the sound content."""
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(
        content[:middle] + bytes(255 - byte for byte in content[middle : middle + 8]) + content[middle + 8 :]
    )
    return content


@pytest.fixture
def damaged(scans) -> bytes:
    write_scan(scans / "b_0000.nii.gz", seed=1, shape=(64, 64, 64))
    return damage(scans / "b_0000.nii.gz")


def test_a_broken_case_does_not_stop_the_others(model, scans, damaged, tmp_path):
    with pytest.raises(UserError, match="1 of 3 cases failed") as caught:
        run(model, scans, output=tmp_path / "out")
    assert "b: preprocessing failed: b_0000.nii.gz: the file is damaged" in str(caught.value)
    assert masks(tmp_path / "out") == ["a.nii.gz", "c.nii.gz"]
    write_scan(scans / "b_0000.nii.gz", seed=1)
    assert run(model, scans, output=tmp_path / "out", continue_prediction=True).written == ["b"]


def test_background_processes_give_the_same_and_name_the_broken_case(model, scans, damaged, tmp_path):
    for name in "ac":
        run(model, scans / f"{name}_0000.nii.gz", output=tmp_path / "here")
    with pytest.raises(UserError, match=r"b: preprocessing failed: b_0000\.nii\.gz"):
        run(model, scans, output=tmp_path / "there", preprocessing_workers=1, export_workers=1)
    assert masks(tmp_path / "here") == masks(tmp_path / "there") == ["a.nii.gz", "c.nii.gz"]
    for name in masks(tmp_path / "here"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_in_a_scan_is_named(scans, tmp_path, reader, ending, value):
    """SimpleITK turns NaN of NIfTI files into 0, nibabel keeps it."""
    tiny = Tiny()
    model = write_model(tmp_path / "results", tiny, plans=tiny.plans() | {"image_reader_writer": reader})
    description = json.loads((model / "dataset.json").read_text())
    write_json(description | {"file_ending": ending}, model / "dataset.json")
    array = np.ones((20, 20, 20), np.float32)
    array[3, 3, 3:5] = value
    for name, image in (("bad", array), ("good", np.random.default_rng(0).normal(size=array.shape))):
        (tmp_path / "scans").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / "scans" / f"{name}_0000{ending}")
    message = rf"bad: preprocessing failed: bad_0000{ending}: the image holds NaN or infinite values in 2 voxels"
    with pytest.raises(UserError, match=message):
        run(model, tmp_path / "scans", output=tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").glob(f"*{ending}")] == [f"good{ending}"]


def test_nan_is_zero_where_that_is_allowed(model, tmp_path):
    array = np.random.default_rng(0).normal(size=(20, 20, 20)).astype(np.float32)
    for name, value in (("with_nan", np.nan), ("with_zero", 0)):
        array[3, 3, 3:5] = value
        (tmp_path / "scans").mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "scans" / f"{name}_0000.nii.gz")
    run(model, tmp_path / "scans", output=tmp_path / "out", allow_suspicious=True)
    with_nan, with_zero = (
        nibabel.load(tmp_path / "out" / f"{name}.nii.gz").get_fdata() for name in ("with_nan", "with_zero")
    )
    assert np.array_equal(with_nan, with_zero)


def test_failures_of_network_and_export_are_named(model, scans, tmp_path, monkeypatch):
    calls = []

    def logits(self, data):
        calls.append(data)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return original(self, data)

    original = pipeline.CasePipeline._logits
    monkeypatch.setattr(pipeline.CasePipeline, "_logits", logits)
    with pytest.raises(UserError, match="b: the network failed: out of memory"):
        run(model, scans, output=tmp_path / "out")
    assert masks(tmp_path / "out") == ["a.nii.gz", "c.nii.gz"]

    def export(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(pipeline, "export_case", export)
    with pytest.raises(UserError, match="a: the export failed: no space left on device"):
        run(model, scans / "a_0000.nii.gz", output=tmp_path / "out")


def test_a_killed_worker_ends_the_run(model, scans, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "preprocess_case", _kill_this_process)
    with pytest.raises(UserError, match="background process was killed during preprocessing") as caught:
        run(model, scans, output=tmp_path / "out", preprocessing_workers=1)
    # at most as many are handed to the workers as there are workers, and one more
    assert str(caught.value.where) in ("one of the cases a", "one of the cases a, b")


def _kill_this_process(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_mask_appears_only_when_it_is_complete(tmp_path, monkeypatch):
    """An export that dies while it writes, as in a power cut, leaves nothing that looks like a mask."""

    def half(logits, properties, configuration, plans, dataset_json, target, save_probabilities):
        Path(target + ".npz").write_bytes(b"complete")
        Path(target + ".nii.gz").write_bytes(b"half a ma")
        raise SystemExit

    monkeypatch.setattr("nnunetv2.inference.export_prediction.export_prediction_from_logits", half)
    arguments = (np.zeros(1), {}, None, None, {"file_ending": ".nii.gz"}, tmp_path, "a", True)
    with pytest.raises(SystemExit):
        workers.export_case(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_the_mask_is_moved_last(tmp_path, monkeypatch):
    def write(logits, properties, configuration, plans, dataset_json, target, save_probabilities):
        sitk.WriteImage(sitk.GetImageFromArray(np.zeros((2, 2, 2), np.uint8)), target + ".nii.gz")
        for ending in (".npz", ".pkl"):
            Path(target + ending).write_bytes(b"complete")

    moved = []
    original = os.replace
    monkeypatch.setattr("nnunetv2.inference.export_prediction.export_prediction_from_logits", write)
    monkeypatch.setattr(os, "replace", lambda a, b: moved.append(Path(b).name) or original(a, b))
    workers.export_case(np.zeros(1), {}, None, None, {"file_ending": ".nii.gz"}, tmp_path, "a", True)
    assert moved == ["a.npz", "a.pkl", "a.nii.gz"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(moved)


@pytest.mark.parametrize("left", [b"", b"half a mask"])
def test_a_mask_that_was_cut_off_without_a_word_is_no_mask(tmp_path, monkeypatch, left):
    def write(logits, properties, configuration, plans, dataset_json, target, save_probabilities):
        Path(target + ".nii.gz").write_bytes(left)

    monkeypatch.setattr("nnunetv2.inference.export_prediction.export_prediction_from_logits", write)
    with pytest.raises(RuntimeError, match="not written as a whole"):
        workers.export_case(np.zeros(1), {}, None, None, {"file_ending": ".nii.gz"}, tmp_path, "a", False)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
import SimpleITK as sitk
from nnssl.inference.models import open_model
from nnssl.inference.run import PredictionOptions, predict

def write(image, name, compress=False):
    Path(name).write_bytes(b"half a mask")
    if Path(name).name == "b.nii.gz":
        os.kill(os.getpid(), signal.SIGKILL)
    original(image, name, compress)

original, sitk.WriteImage = sitk.WriteImage, write
predict([sys.argv[1]], sys.argv[2], open_model(sys.argv[3]),
        PredictionOptions(device="cpu", precision="fp32", preprocessing_workers=0, export_workers=0))
"""


def test_a_killed_run_is_continued_without_half_masks(model, scans, tmp_path):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, scans, out, model], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert masks(out) == ["a.nii.gz"]
    report = run(model, scans, output=out, continue_prediction=True)
    assert report.written == ["b", "c"]
    run(model, scans, output=tmp_path / "undisturbed")
    for name in masks(out):
        assert (out / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
    assert not (out / workers.SCRATCH).exists()


ORPHAN = """
import os, signal
from nnssl.inference.workers import worker_pool
if __name__ == "__main__":
    with worker_pool(1) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        signal.pause()
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(ORPHAN)
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    try:
        # the worker has inherited the pipe, which is at its end only when the worker has ended too
        parent.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def test_output_that_would_lose_files(model, scans, tmp_path):
    with pytest.raises(UserError, match="output folder is the input folder"):
        run(model, scans, output=scans)
    labels = tmp_path / "labelsTs"
    write_scan(labels / "a.nii.gz")
    with pytest.raises(UserError, match="that no prediction wrote"):
        run(model, scans, output=labels)
    with pytest.raises(UserError, match="-o is not a folder"):
        run(model, scans, output=tmp_path / "mask.nii.gz")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="-o is not a folder"):
        run(model, scans, output=tmp_path / "file")


def test_broken_input_is_told_before_a_network_is_loaded(model, scans, tmp_path, monkeypatch):
    monkeypatch.setattr("nnssl.inference.run._load", lambda *arguments: pytest.fail("the network was loaded"))
    write_scan(scans / "d_0001.nii.gz")
    with pytest.raises(UserError, match="case d"):
        run(model, scans, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_size": 0}, "-step_size"),
        ({"num_parts": 2, "part_id": 2}, "-part_id"),
        ({"preprocessing_workers": -1}, "-npp"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        PredictionOptions(**options)


def test_what_was_done_is_recorded(model, scans, tmp_path):
    run(model, scans, output=tmp_path / "out", step_size=0.7)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert record["model_folder"] == str(model)
    assert record["folds"] == ["0"]
    assert record["step_size"] == 0.7
    assert json.loads((tmp_path / "out" / "plans.json").read_text()) == json.loads((model / "plans.json").read_text())
