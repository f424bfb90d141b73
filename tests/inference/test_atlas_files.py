"""Files that a prediction by atlases cannot use, and which atlas is the scan itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from scipy.ndimage import gaussian_filter
from skimage import io

from nnssl.cli import run as run_command
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.inference.atlases import AtlasOptions, predict_by_atlases
from nnssl.utils.files import write_json

AFFINE = AtlasOptions(transform="affine")
SHAPE = (20, 24, 22)


def _image(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    image = 100 + 20 * gaussian_filter(np.random.default_rng(seed).normal(size=shape), 2)
    return image.astype(np.float32)


def _mask(image: np.ndarray) -> np.ndarray:
    return (image > np.median(image)).astype(np.uint8)


def _nifti(array: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(file))


def _describe(folder: Path, ending: str) -> RawDataset:
    labels = {"background": 0, "bright": 1}
    description = {"channel_names": {"0": "gray"}, "labels": labels, "numTraining": 2, "file_ending": ending}
    write_json(description, folder / "dataset.json")
    return RawDataset.open(folder)


@pytest.fixture
def raw(tmp_path) -> RawDataset:
    folder = tmp_path / "raw" / "Dataset904_Files"
    for seed, case in enumerate(("a", "b")):
        _nifti(_image(seed), folder / "imagesTr" / f"{case}_0000.nii.gz")
        _nifti(_mask(_image(seed)), folder / "labelsTr" / f"{case}.nii.gz")
    _nifti(_image(2), folder / "imagesUn" / "scan_0000.nii.gz")
    return _describe(folder, ".nii.gz")


def _predict(raw: RawDataset, options: AtlasOptions = AFFINE, scans: str = "imagesUn") -> Path:
    output = raw.folder.parent / "out"
    predict_by_atlases([raw.folder / scans], output, raw, options)
    return output


def test_defective_atlases_are_named_before_anything_is_done(raw):
    (raw.folder / "labelsTr" / "a.nii.gz").unlink()
    _nifti(_mask(_image(1, (20, 24, 21))), raw.folder / "labelsTr" / "b.nii.gz")
    with pytest.raises(UserError, match="labeled cases cannot be registered") as refused:
        _predict(raw)
    assert "a: labelsTr/a.nii.gz: case has no label" in str(refused.value)
    assert "b: labelsTr/b.nii.gz: label differs from its image in shape (20, 24, 21)" in str(refused.value)
    assert not (raw.folder.parent / "out").exists()
    _nifti(_mask(_image(1)), raw.folder / "labelsTr" / "b.nii.gz")
    predict_by_atlases([raw.folder / "imagesUn"], raw.folder.parent / "out", raw, AtlasOptions(atlases=("b",)))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (np.full(SHAPE, 7, np.float32), "every voxel is 7"),
        (np.pad(np.full((10, 12, 11), 7, np.float32), 5)[:, :, 1:], "no contrast"),
        (_image(0)[:1], "2D, most are 3D"),
        (np.where(_image(0) > 101, np.nan, _image(0)), "NaN"),
    ],
)
def test_atlases_without_anything_to_register_are_named(raw, content, told):
    _nifti(_image(3), raw.folder / "imagesTr" / "c_0000.nii.gz")
    _nifti(_mask(_image(3)), raw.folder / "labelsTr" / "c.nii.gz")
    _nifti(content.astype(np.float32), raw.folder / "imagesTr" / "a_0000.nii.gz")
    _nifti(np.zeros(content.shape, np.uint8), raw.folder / "labelsTr" / "a.nii.gz")
    with pytest.raises(UserError, match=f"(?s)a: imagesTr/a_0000.nii.gz.*{told}"):
        _predict(RawDataset.open(raw.folder))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (np.full(SHAPE, 7, np.float32), "no contrast"),
        (_image(0)[:1], "differ in dimension"),
        (np.full(SHAPE, np.nan, np.float32), "NaN or infinite values in 10560 voxels"),
        (np.where(_image(0) > 101, np.inf, _image(0)), "NaN or infinite values"),
    ],
)
def test_scans_that_cannot_be_registered_are_named_and_others_done(raw, content, told):
    _nifti(content.astype(np.float32), raw.folder / "imagesUn" / "bad_0000.nii.gz")
    with pytest.raises(UserError, match=f"(?s)1 of 2 cases failed.*bad: .*{told}"):
        _predict(raw)
    assert [file.name for file in (raw.folder.parent / "out").glob("*.nii.gz")] == ["scan.nii.gz"]


def test_suspicious_values_may_be_allowed(raw):
    for file in ("imagesUn/scan", "imagesTr/a"):
        image = _image(2)
        image[0, 0, 0] = np.nan
        _nifti(image, raw.folder / f"{file}_0000.nii.gz")
    assert (_predict(raw, AtlasOptions(transform="affine", allow_suspicious=True)) / "scan.nii.gz").is_file()


def test_a_missing_label_of_png_images(tmp_path):
    folder = tmp_path / "raw" / "Dataset905_Png"
    for part in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / part).mkdir(parents=True)
    for seed, case in enumerate(("imagesTr/a", "imagesTr/b", "imagesUn/scan")):
        io.imsave(folder / f"{case}_0000.png", _image(seed, (40, 44)).astype(np.uint8), check_contrast=False)
    io.imsave(folder / "labelsTr" / "b.png", _mask(_image(1, (40, 44))), check_contrast=False)
    raw = _describe(folder, ".png")
    with pytest.raises(UserError, match=r"a: labelsTr/a\.png: case has no label"):
        _predict(raw)
    assert (_predict(raw, AtlasOptions(transform="affine", atlases=("b",))) / "scan.png").is_file()


def test_an_unexpected_error_stops_only_its_case(raw, monkeypatch):
    _nifti(_image(5), raw.folder / "imagesUn" / "other_0000.nii.gz")
    reader = raw.reader_writer_class()
    read = reader.read_images

    def fail(self, files):
        if "other" in Path(files[0]).name:
            raise ValueError("first line\nno such number")
        return read(self, files)

    monkeypatch.setattr(reader, "read_images", fail)
    with pytest.raises(UserError, match=r"(?s)1 of 2 cases failed.*other: ValueError: no such number"):
        _predict(raw)
    assert (raw.folder.parent / "out" / "scan.nii.gz").is_file()


@pytest.mark.parametrize("copy", [True, False])
def test_an_atlas_under_another_name_does_not_segment_itself(raw, capsys, copy):
    scans = raw.folder / "scans"
    scans.mkdir()
    atlas, scan = raw.folder / "imagesTr" / "a_0000.nii.gz", scans / "renamed_0000.nii.gz"
    if copy:
        shutil.copyfile(atlas, scan)
    else:
        scan.symlink_to(atlas)
    # another scan that has the name of an atlas
    _nifti(_image(6), scans / "b_0000.nii.gz")
    output = _predict(raw, scans="scans")
    told = capsys.readouterr().out
    assert "renamed: left out as an atlas, being the same scan: a\n" in told
    assert "b: left out" not in told
    assert (output / "b.nii.gz").is_file()
    with pytest.raises(UserError, match="cannot segment itself"):
        predict_by_atlases([scan], raw.folder.parent / "alone", raw, AtlasOptions("local", "affine", ("a",)))


def test_an_atlas_named_twice_is_refused(raw, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", str(raw.folder.parent))
    command = ["-i", str(raw.folder / "imagesUn"), "-o", str(raw.folder / "out"), "-d", "904", "--atlases", "a", "a"]
    assert run_command("atlas_predict", command) == 2
    assert "the same name twice in --atlases" in capsys.readouterr().err


@pytest.fixture
def tiff(tmp_path) -> RawDataset:
    folder = tmp_path / "raw" / "Dataset906_Tiff"
    for part in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / part).mkdir(parents=True)
    for seed, case in enumerate(("imagesTr/a", "imagesTr/b", "imagesUn/scan")):
        tifffile.imwrite(folder / f"{case}_0000.tif", _image(seed))
        (folder / f"{case}.json").write_text(json.dumps({"spacing": [3, 1, 1]}))
    for seed, case in enumerate("ab"):
        tifffile.imwrite(folder / "labelsTr" / f"{case}.tif", _mask(_image(seed)))
        (folder / "labelsTr" / f"{case}.json").write_text(json.dumps({"spacing": [3, 1, 1]}))
    return _describe(folder, ".tif")


def test_masks_of_3d_tiff_have_their_spacing(tiff):
    output = _predict(tiff)
    written = ["dataset.json", "predict_from_raw_data_args.json", "scan.json", "scan.tif"]
    assert sorted(file.name for file in output.iterdir()) == written
    assert json.loads((output / "scan.json").read_text()) == {"spacing": [3, 1, 1]}


@pytest.mark.parametrize("name", ["scanABCD", "scanABCD_0000"])
def test_spacing_that_would_not_be_read_is_an_error(tiff, name):
    scans = tiff.folder / "scans"
    scans.mkdir()
    tifffile.imwrite(scans / f"{name}.tif", _image(4))
    (scans / f"{name}.json").write_text(json.dumps({"spacing": [3, 1, 1]}))
    with pytest.raises(UserError, match="spacing of images would not be read") as refused:
        _predict(tiff, scans="scans")
    assert f"{name}.tif: " in str(refused.value)
    fix = "rename it to scanABCD.json" if name.endswith("_0000") else "rename the image to scanABCD_0000.tif"
    assert fix in str(refused.value)


def test_spacing_of_an_atlas_that_would_not_be_read_is_an_error(tiff):
    (tiff.folder / "imagesTr" / "a.json").rename(tiff.folder / "imagesTr" / "a_0000.json")
    (tiff.folder / "labelsTr" / "a.json").unlink()
    with pytest.raises(UserError, match=r"(?s)imagesTr/a_0000.tif: .*rename it to a.json"):
        _predict(tiff)
