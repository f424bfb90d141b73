"""Atlases and scans whose axes do not lie in space in the same way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.dataset.raw import RawDataset
from nnssl.inference.atlases import AtlasOptions, predict_by_atlases
from nnssl.utils.files import write_json

NAME = "Dataset903_Directions"
SPACING = (1.0, 1.25, 1.5)
TILT = np.deg2rad(35)
ROTATED = np.array([[np.cos(TILT), -np.sin(TILT), 0], [np.sin(TILT), np.cos(TILT), 0], [0, 0, 1]])


def _phantom(slices: int = 28) -> tuple[sitk.Image, sitk.Image]:
    """A body that is its own mirror image, with the same structure on its left (1) and on its right (2)."""
    shape = (slices, 36, 48)
    z, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    z = z * (1.0 if slices > 1 else 0.0)
    body = (z / 11) ** 2 + (y / 14) ** 2 + (x / 20) ** 2 < 1
    label = np.zeros(shape, np.uint8)
    label[((z - 2) / 5) ** 2 + ((y - 4) / 5) ** 2 + ((x - 10) / 5) ** 2 < 1] = 1
    label[((z - 2) / 5) ** 2 + ((y - 4) / 5) ** 2 + ((x + 10) / 5) ** 2 < 1] = 2
    image = (100 * body + 5 * y * body + 80 * (label > 0)).astype(np.float32)
    return _in_space(image), _in_space(label)


def _in_space(array: np.ndarray, spacing=SPACING, direction=None, origin=(0, 0, 0)) -> sitk.Image:
    image = sitk.GetImageFromArray(np.ascontiguousarray(array))
    image.SetSpacing(spacing)
    image.SetDirection((np.eye(3) if direction is None else direction).ravel().tolist())
    image.SetOrigin(origin)
    return image


def _mirrored(image: sitk.Image) -> sitk.Image:
    end = (image.GetSize()[0] - 1) * SPACING[0]
    return _in_space(sitk.GetArrayFromImage(image)[..., ::-1], direction=np.diag([-1, 1, 1]), origin=(end, 0, 0))


def _sagittal(image: sitk.Image) -> sitk.Image:
    # in the file y, z, x
    array = sitk.GetArrayFromImage(image).transpose(2, 0, 1)
    return _in_space(array, (SPACING[1], SPACING[2], SPACING[0]), np.eye(3)[:, [1, 2, 0]])


def _oblique(image: sitk.Image) -> sitk.Image:
    """The same object on a grid that is rotated about its middle."""
    size = np.array([56, 56, image.GetSize()[2]])
    middle = (np.array(image.GetSize()) - 1) / 2 * SPACING
    origin = middle - ROTATED @ ((size - 1) / 2 * SPACING)
    grid = sitk.Image(size.tolist(), image.GetPixelID())
    grid.SetSpacing(SPACING)
    grid.SetDirection(ROTATED.ravel().tolist())
    grid.SetOrigin(origin.tolist())
    kind = sitk.sitkNearestNeighbor if image.GetPixelID() == sitk.sitkUInt8 else sitk.sitkLinear
    return sitk.Resample(image, grid, sitk.Transform(), kind)


def _planned_along_the_object(image: sitk.Image) -> sitk.Image:
    """Slices that follow an object that lies rotated in space: the array is that of the atlas."""
    return _in_space(sitk.GetArrayFromImage(image), direction=ROTATED, origin=(7, -3, 2))


STORED = {
    "mirrored": _mirrored,
    "sagittal": _sagittal,
    "oblique": _oblique,
    "planned": _planned_along_the_object,
    "same": lambda image: image,
}


def _data_set(folder: Path, slices: int, atlas: str, scans: list[str], reader: str = "SimpleITKIO") -> RawDataset:
    image, label = _phantom(slices)
    for part, name, content in (("imagesTr", "atlas_0000", image), ("labelsTr", "atlas", label)):
        (folder / NAME / part).mkdir(parents=True)
        sitk.WriteImage(STORED[atlas](content), str(folder / NAME / part / f"{name}.nii.gz"))
    (folder / NAME / "imagesUn").mkdir()
    for scan in scans:
        brighter = sitk.Cast(STORED[scan](1.5 * image), sitk.sitkFloat32)
        sitk.WriteImage(brighter, str(folder / NAME / "imagesUn" / f"{scan}_0000.nii.gz"))
    labels = {"background": 0, "left": 1, "right": 2}
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    write_json(description | {"overwrite_image_reader_writer": reader}, folder / NAME / "dataset.json")
    return RawDataset.open(folder / NAME)


def _least_dice(mask: Path, scan: str, slices: int) -> float:
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(mask)))
    true = sitk.GetArrayFromImage(STORED[scan](_phantom(slices)[1]))
    return min(2 * ((found == n) & (true == n)).sum() / ((found == n).sum() + (true == n).sum()) for n in (1, 2))


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_structures_keep_their_side(tmp_path, reader):
    scans = ["mirrored", "sagittal", "oblique", "planned", "same"]
    raw = _data_set(tmp_path, 28, "same", scans, reader)
    predict_by_atlases([raw.folder / "imagesUn"], tmp_path / "out", raw, AtlasOptions(transform="affine"))
    dice = {scan: _least_dice(tmp_path / "out" / f"{scan}.nii.gz", scan, 28) for scan in scans}
    assert min(dice.values()) > 0.85, dice


def test_slices_keep_their_side(tmp_path):
    raw = _data_set(tmp_path, 1, "mirrored", ["same", "mirrored"])
    predict_by_atlases([raw.folder / "imagesUn"], tmp_path / "out", raw, AtlasOptions(transform="affine"))
    for scan in ("same", "mirrored"):
        assert _least_dice(tmp_path / "out" / f"{scan}.nii.gz", scan, 1) > 0.85


def test_a_direction_that_all_scans_share_changes_nothing(tmp_path):
    masks = []
    for number, (atlas, scan) in enumerate((("same", "same"), ("planned", "planned"))):
        raw = _data_set(tmp_path / str(number), 28, atlas, [scan])
        predict_by_atlases([raw.folder / "imagesUn"], tmp_path / str(number) / "out", raw)
        masks.append(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / str(number) / "out" / f"{scan}.nii.gz"))))
    assert np.array_equal(*masks)
