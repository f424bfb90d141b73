"""Labels that are propagated from atlases to scans."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnssl.cli import run as run_command
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.inference.atlases import AtlasOptions, AtlasSegmenter, predict_by_atlases
from nnssl.trainers.engine.registered_labels import registered_masks
from nnssl.utils.files import write_json

NAME = "Dataset902_Atlases"
ORIGIN = (10.0, -20.0, 5.0)


def _scan(shift: tuple[int, int, int], scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Blobs in a larger empty field, moved by voxels; two classes of bright and dark ones."""
    noise = gaussian_filter(np.random.default_rng(0).normal(size=(24, 26, 28)), 3)
    noise /= noise.std()
    image, label = np.zeros((40, 40, 40), np.float32), np.zeros((40, 40, 40), np.uint8)
    place = tuple(slice(6 + s, 6 + s + n) for s, n in zip(shift, noise.shape, strict=True))
    image[place] = scale * (500 + 100 * noise)
    label[place] = np.where(noise > 0.7, 1, np.where(noise < -0.7, 2, 0))
    return image, label


def _write(array: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetOrigin(ORIGIN)
    image.SetSpacing((1.5, 1.0, 1.0))
    sitk.WriteImage(image, str(file))


@pytest.fixture
def raw(tmp_path, monkeypatch) -> RawDataset:
    """Two atlases, and two scans that are the same moved, one of them brighter."""
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = tmp_path / NAME
    for case, shift in (("atlas_a", (0, 0, 0)), ("atlas_b", (2, 1, 0))):
        image, label = _scan(shift)
        _write(image, folder / "imagesTr" / f"{case}_0000.nii.gz")
        _write(label, folder / "labelsTr" / f"{case}.nii.gz")
    for case, shift, scale in (("scan_1", (4, 0, 3), 1.0), ("scan_2", (1, 5, 2), 2.0)):
        _write(_scan(shift, scale)[0], folder / "imagesUn" / f"{case}_0000.nii.gz")
    labels = {"background": 0, "bright": 1, "dark": 2}
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 2, "file_ending": ".nii.gz"}
    write_json(description, folder / "dataset.json")
    return RawDataset.open(NAME)


def _dice(mask: np.ndarray, reference: np.ndarray, label: int) -> float:
    a, b = mask == label, reference == label
    return 2 * (a & b).sum() / (a.sum() + b.sum())


@pytest.mark.parametrize("options", [AtlasOptions(), AtlasOptions("majority", "affine", num_processes=2)])
def test_labels_arrive_where_the_structures_are(raw, tmp_path, options):
    report = predict_by_atlases([raw.folder / "imagesUn"], tmp_path / "out", raw, options)
    assert report.written == ["scan_1", "scan_2"]
    for case, shift in (("scan_1", (4, 0, 3)), ("scan_2", (1, 5, 2))):
        image = sitk.ReadImage(str(tmp_path / "out" / f"{case}.nii.gz"))
        assert image.GetOrigin() == ORIGIN
        mask, (_, reference) = sitk.GetArrayFromImage(image), _scan(shift)
        assert min(_dice(mask, reference, label) for label in (1, 2)) > 0.95


def test_the_command_goes_on_where_it_was_stopped(raw, tmp_path, capsys):
    command = ["-i", str(raw.folder / "imagesUn"), "-o", str(tmp_path / "out"), "-d", "902", "-np", "1"]
    command += ["--transform", "affine"]
    assert run_command("atlas_predict", command) == 0
    assert "2 cases written" in capsys.readouterr().out
    (tmp_path / "out" / "scan_2.nii.gz").unlink()
    before = (tmp_path / "out" / "scan_1.nii.gz").stat().st_mtime_ns
    assert run_command("atlas_predict", [*command, "--continue_prediction"]) == 0
    assert "1 case written" in capsys.readouterr().out
    assert (tmp_path / "out" / "scan_1.nii.gz").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "scan_2.nii.gz").is_file()
    assert run_command("atlas_predict", [*command, "--continue_prediction", "--fusion", "majority"]) == 2
    assert "cannot be continued" in capsys.readouterr().err


def test_a_changed_scan_is_registered_again_and_its_evaluation_goes(raw, tmp_path, capsys):
    out, options = tmp_path / "out", AtlasOptions(transform="affine", continue_prediction=True)
    predict_by_atlases([raw.folder / "imagesUn"], out, raw, options)
    files = {name: out / f"{name}.nii.gz" for name in ("scan_1", "scan_2")}
    before = {name: file.stat().st_mtime_ns for name, file in files.items()}
    entries = [{"case": name, "prediction_file": str(file)} for name, file in files.items()]
    write_json({"metric_per_case": entries}, out / "summary.json")
    shutil.copy(raw.folder / "imagesUn" / "scan_2_0000.nii.gz", raw.folder / "imagesUn" / "scan_1_0000.nii.gz")
    assert predict_by_atlases([raw.folder / "imagesUn"], out, raw, options).written == ["scan_1"]
    assert "scan_1: is predicted again" in capsys.readouterr().out
    assert files["scan_1"].stat().st_mtime_ns > before["scan_1"]
    assert files["scan_2"].stat().st_mtime_ns == before["scan_2"]
    assert not (out / "summary.json").exists()


def test_a_mask_that_is_cut_off_is_told(raw, tmp_path, monkeypatch):
    def cut(self, mask, file, properties):
        write(self, mask, file, properties)
        os.truncate(file, 40)

    reader = raw.reader_writer_class()
    write = reader.write_seg
    monkeypatch.setattr(reader, "write_seg", cut)
    options = AtlasOptions(transform="affine", num_processes=1)
    with pytest.raises(UserError, match="was not written as a whole"):
        predict_by_atlases([raw.folder / "imagesUn"], tmp_path / "out", raw, options)
    assert not list((tmp_path / "out").glob("*.nii.gz"))


def test_a_scan_that_fails_is_named_and_the_others_are_done(raw, tmp_path):
    _write(np.zeros((8, 8, 8), np.float32), raw.folder / "imagesUn" / "empty_0000.nii.gz")
    with pytest.raises(UserError, match="1 of 3 cases failed") as caught:
        predict_by_atlases([raw.folder / "imagesUn"], tmp_path / "out", raw, AtlasOptions(transform="affine"))
    assert "empty: the scan is empty" in str(caught.value)
    assert sorted(file.name for file in (tmp_path / "out").glob("*.nii.gz")) == ["scan_1.nii.gz", "scan_2.nii.gz"]


def test_masks_that_nobody_predicted_are_not_overwritten(raw):
    with pytest.raises(UserError, match="no prediction wrote"):
        predict_by_atlases([raw.folder / "imagesTr"], raw.folder / "labelsTr", raw)


def test_an_atlas_is_not_its_own_atlas_and_unknown_ones_are_refused(raw, tmp_path):
    options = AtlasOptions(transform="affine", atlases=("atlas_a",))
    with pytest.raises(UserError, match="cannot segment itself"):
        predict_by_atlases([raw.folder / "imagesTr" / "atlas_a_0000.nii.gz"], tmp_path / "out", raw, options)
    with pytest.raises(UserError, match="not a labeled case") as caught:
        predict_by_atlases([raw.folder / "imagesUn"], tmp_path / "out", raw, AtlasOptions(atlases=("scan_1",)))
    assert "atlas_a, atlas_b" in str(caught.value)


def test_voxels_that_an_atlas_does_not_know_are_decided_by_others(raw, tmp_path):
    image, label = _scan((2, 1, 0))
    known = label.copy()
    known[:, :, :20] = 3
    _write(known, raw.folder / "labelsTr" / "atlas_b.nii.gz")
    segmenter = AtlasSegmenter(raw.labeled, raw.reader_writer_class(), 3, tmp_path, ".nii.gz", "majority", "affine")
    mask = segmenter.segment(image[None], [1.0, 1.0, 1.5])
    assert set(np.unique(mask)) == {0, 1, 2}
    assert min(_dice(mask, label, one) for one in (1, 2)) > 0.9


def test_registered_labels_of_a_training_need_its_labeled_cases(raw, tmp_path):
    trainer = SimpleNamespace(
        plans_manager=SimpleNamespace(dataset_name=NAME),
        preprocessed_dataset_folder_base=str(tmp_path / "preprocessed"),
        split=lambda: SimpleNamespace(train=["atlas_a", "atlas_c"]),
    )
    with pytest.raises(UserError, match="not in the raw data set") as refused:
        registered_masks(trainer, 0)
    assert "atlas_c" in str(refused.value)
    assert "atlas_a" not in str(refused.value)
    assert not (tmp_path / "preprocessed").exists()
