from __future__ import annotations

import matplotlib.image
import numpy as np
import pytest
import SimpleITK

from nnssl.errors import UserError
from nnssl.pictures.overlay import OverlayCase, _read_slices, fullest_slice, save_overlay

BLUE = np.array((31, 119, 180)) / 255


def write(values: np.ndarray, path, spacing=(1.0, 1.0, 1.0), vector=False):
    image = SimpleITK.GetImageFromArray(values, isVector=vector)
    image.SetSpacing(spacing[::-1][-image.GetDimension() :])
    SimpleITK.WriteImage(image, str(path))
    return path


@pytest.fixture
def case(tmp_path) -> OverlayCase:
    image = np.random.default_rng(0).normal(size=(6, 20, 24)).astype(np.float32)
    label = np.zeros((6, 20, 24), np.uint8)
    label[2, 4:14, 4:14] = 1
    label[3, 4:9, 4:9], label[3, 12:16, 12:16] = 1, 2
    other = np.roll(label, 3, axis=2)
    return OverlayCase(
        name="case",
        image=write(image, tmp_path / "image.nii.gz", (3, 1, 1)),
        reference=write(label, tmp_path / "reference.nii.gz", (3, 1, 1)),
        predictions={"A": write(other, tmp_path / "a.nii.gz", (3, 1, 1))},
        captions={"A": "Dice 0.500"},
    )


def count(picture: np.ndarray, color: np.ndarray) -> int:
    return int((np.abs(picture[..., :3] - color).max(-1) < 0.05).sum())


def test_picture_has_a_column_per_mask_and_both_colors(tmp_path, case):
    path = save_overlay(tmp_path / "overlay.png", [case, case], {1: "first", 2: "second"})
    picture = matplotlib.image.imread(path)
    assert abs(picture.shape[1] - 660) <= 2
    blue, orange = BLUE, np.array((255, 127, 14)) / 255
    for half in (picture[:, :330], picture[:, 330:]):
        assert count(half, blue) > 100
        assert count(half, orange) > 50


def test_slice_has_the_most_classes_across_the_widest_spacing(case):
    image, masks, aspect = _read_slices(case)
    assert image.shape == (20, 24)
    assert aspect == 1.0
    assert set(np.unique(masks["Reference"])) == {0, 1, 2}


def testfullest_slice_breaks_ties_by_area():
    mask = np.zeros((4, 5, 5), np.uint8)
    mask[1, 0, 0], mask[2, :3, :3] = 1, 1
    assert fullest_slice(mask, 0) == 2
    assert 0 <= fullest_slice(np.zeros((4, 5, 5), np.uint8), 0) < 4


def test_anisotropic_pixels_keep_their_proportion(tmp_path):
    image = np.zeros((10, 12, 14), np.float32)
    mask = np.zeros((10, 12, 14), np.uint8)
    mask[:, 6, :] = 1
    files = [write(v, tmp_path / n, (2, 5, 1)) for v, n in ((image, "i.nii.gz"), (mask, "m.nii.gz"))]
    slice_, masks, aspect = _read_slices(OverlayCase("c", files[0], files[1], {"A": files[1]}))
    assert slice_.shape == (10, 14)
    assert masks["A"].all()
    assert aspect == 2.0


def test_color_photographs_and_empty_predictions(tmp_path):
    photo = np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8)
    mask = np.zeros((30, 40), np.uint8)
    mask[:, 10:20] = 1
    case = OverlayCase(
        "photo",
        write(photo, tmp_path / "photo.png", vector=True),
        write(mask, tmp_path / "mask.png"),
        {"empty": write(np.zeros_like(mask), tmp_path / "empty.png")},
    )
    picture = matplotlib.image.imread(save_overlay(tmp_path / "o.png", [case], {1: "cell"}))
    assert count(picture, BLUE) > 100


def test_mistakes_are_named(tmp_path, case):
    with pytest.raises(UserError, match="at least one case"):
        save_overlay(tmp_path / "o.png", [], {1: "a"})
    without = OverlayCase("other", case.image, case.reference, {})
    with pytest.raises(UserError, match="different predictions"):
        save_overlay(tmp_path / "o.png", [case, without], {1: "a"})
    small = write(np.zeros((6, 20, 23), np.uint8), tmp_path / "small.nii.gz")
    with pytest.raises(UserError, match=r"grid of the image[\s\S]*small"):
        save_overlay(tmp_path / "o.png", [OverlayCase("c", case.image, case.reference, {"A": small})], {1: "a"})
    with pytest.raises(UserError, match="cannot be read"):
        save_overlay(tmp_path / "o.png", [OverlayCase("c", tmp_path / "no.nii.gz", case.reference, {})], {1: "a"})
    assert not (tmp_path / "o.png").exists()
