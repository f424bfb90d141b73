from __future__ import annotations

import json

import numpy as np
import pytest
import SimpleITK
from scipy.ndimage import label as connected

from nnssl.dataset.phantom import PHANTOM_LABELS, make_phantom_case, make_phantom_dataset
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError


def array(path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def digests(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout_counts_and_geometry(tmp_path):
    folder = make_phantom_dataset(tmp_path / "Dataset007_P", labeled=2, unlabeled=3, test=1, channels=2)
    counts = {path.name: len(list(path.iterdir())) for path in folder.iterdir() if path.is_dir()}
    assert counts == {"imagesTr": 4, "labelsTr": 2, "imagesUn": 6, "imagesTs": 2, "labelsTs": 1}
    dataset = RawDataset.open(folder)
    assert (list(dataset.labeled), list(dataset.test)) == (["phantom_000", "phantom_001"], ["phantom_005"])
    assert list(dataset.unlabeled) == ["phantom_002", "phantom_003", "phantom_004"]
    assert dataset.num_channels == 2
    for file in (folder / "imagesUn" / "phantom_003_0001.nii.gz", folder / "labelsTs" / "phantom_005.nii.gz"):
        image = SimpleITK.ReadImage(str(file))
        assert image.GetSize() == (40, 40, 32)
        assert image.GetSpacing() == pytest.approx((1.0, 1.0, 1.5))
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["Dataset007_P"]


@pytest.mark.parametrize("index", range(6))
def test_every_case_has_each_structure_in_one_piece_and_contrast(index):
    image, label = make_phantom_case(seed=3, index=index)
    assert (image.shape, image.dtype, label.shape, label.dtype) == ((1, 32, 40, 40), np.float32, (32, 40, 40), np.uint8)
    assert np.isfinite(image).all()
    assert sorted(np.unique(label)) == sorted(PHANTOM_LABELS.values())
    means = {name: float(image[0][label == value].mean()) for name, value in PHANTOM_LABELS.items()}
    assert means["background"] < min(mean for name, mean in means.items() if name != "background")
    for value in (1, 2, 3, 4):
        pieces, _ = connected(label == value)
        assert np.bincount(pieces.ravel())[1:].max() > 0.9 * (label == value).sum()


def test_the_cavity_lies_in_the_large_organ():
    _, label = make_phantom_case(seed=0, index=0)
    cavity = label == PHANTOM_LABELS["cavity"]
    rim = np.zeros_like(cavity)
    for axis in range(3):
        for step in (-1, 1):
            rim |= np.roll(cavity, step, axis)
    around = label[rim & ~cavity]
    assert (around == PHANTOM_LABELS["large_organ"]).mean() > 0.8


def test_same_seed_same_files_and_other_seed_other_voxels(tmp_path):
    arguments = {"labeled": 1, "unlabeled": 1, "test": 1, "shape": (16, 20, 18)}
    first = make_phantom_dataset(tmp_path / "Dataset001_A", **arguments)
    again = make_phantom_dataset(tmp_path / "a" / "Dataset001_A", **arguments)
    other = make_phantom_dataset(tmp_path / "b" / "Dataset001_A", seed=1, **arguments)
    assert digests(first) == digests(again)
    name = "imagesTr/phantom_000_0000.nii.gz"
    assert not np.array_equal(array(first / name), array(other / name))


def test_a_case_does_not_depend_on_the_number_of_cases(tmp_path):
    few = make_phantom_dataset(tmp_path / "Dataset001_A", labeled=1, unlabeled=1, test=0, shape=(16, 20, 18))
    many = make_phantom_dataset(tmp_path / "Dataset002_B", labeled=2, unlabeled=0, test=0, shape=(16, 20, 18))
    np.testing.assert_array_equal(
        array(few / "imagesUn" / "phantom_001_0000.nii.gz"), array(many / "imagesTr" / "phantom_001_0000.nii.gz")
    )


def test_cases_differ_in_size_and_scale():
    cases = [make_phantom_case(seed=0, index=index) for index in range(8)]
    volumes = [(label == 1).sum() for _, label in cases]
    scales = [image.max() for image, _ in cases]
    assert max(volumes) > 1.5 * min(volumes)
    assert max(scales) > 1.5 * min(scales)


@pytest.mark.parametrize("ending", [".nii.gz", ".png", ".mha"])
def test_two_dimensions(tmp_path, ending):
    folder = make_phantom_dataset(
        tmp_path / "Dataset001_A", labeled=1, unlabeled=1, test=1, dimensions=2, file_ending=ending, channels=2
    )
    image, label = (
        array(folder / "imagesTr" / f"phantom_000_0001{ending}"),
        array(folder / f"labelsTr/phantom_000{ending}"),
    )
    assert image.shape == label.shape == (88, 80)
    assert image.std() > 10
    assert set(np.unique(label)) == set(PHANTOM_LABELS.values())
    dataset = RawDataset.open(folder)
    voxels, _ = dataset.reader_writer_class()().read_images(dataset.labeled["phantom_000"].images)
    assert voxels.shape == (2, 1, 88, 80)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimensions": 4}, "2 or 3 dimensions"),
        ({"file_ending": ".png"}, "cannot be written as '.png'"),
        ({"shape": (8, 40, 40)}, "16 voxels or more"),
        ({"shape": (40, 40)}, "3 numbers"),
        ({"spacing": (1, 0, 1)}, "positive numbers in mm"),
        ({"labeled": 0, "unlabeled": 0, "test": 0}, "at least one case"),
        ({"channels": 0}, "one channel"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        make_phantom_dataset(tmp_path / "Dataset001_A", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_as_it_is(tmp_path):
    (tmp_path / "keep.txt").touch()
    with pytest.raises(UserError, match="exists already"):
        make_phantom_dataset(tmp_path, labeled=1, unlabeled=0, test=0)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]
