from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from skimage import io

from nnssl.dataset.case_check import CheckRules, check_case
from nnssl.dataset.integrity import SHOWN_FINDINGS, check_dataset
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError

from .synthetic import SHAPE, make_raw, mask, voxels, write_dataset_json, write_volume

ROTATED = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def check(folder: Path, allow_suspicious: bool = False) -> list[str]:
    return check_dataset(RawDataset.open(folder), 1, allow_suspicious)


def errors_of(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        check(folder)
    return str(error.value)


def image(folder: Path, case: str = "lab_0", channel: int = 0) -> Path:
    part = {"lab": "imagesTr", "unl": "imagesUn", "tst": "imagesTs"}[case[:3]]
    return folder / part / f"{case}_{channel:04d}.nii.gz"


def label(folder: Path, case: str = "lab_0") -> Path:
    return folder / "labelsTr" / f"{case}.nii.gz"


def four_dimensional(folder: Path) -> None:
    series = sitk.JoinSeries([sitk.GetImageFromArray(voxels(i)) for i in range(2)])
    sitk.WriteImage(series, str(image(folder, "unl_0")))


def link_to_nothing(folder: Path) -> None:
    image(folder, "unl_0").unlink()
    image(folder, "unl_0").symlink_to("gone.nii.gz")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_affine(folder: Path, path: Path, **geometry) -> None:
    write_volume(path, mask() if path.parent.name == "labelsTr" else voxels(50), **geometry)


def empty_all_labels(folder: Path) -> None:
    for index in range(3):
        write_volume(label(folder, f"lab_{index}"), mask(()))


def move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(source, target)


Spoil = Callable[[Path], object]

# what is done to a sound data set with two channels, and what the report must say
ERRORS: dict[str, tuple[Spoil, list[str]]] = {
    "missing channel": (
        lambda d: image(d, "lab_0", 1).unlink(),
        ["imagesTr/lab_0_0000.nii.gz", "1 channel(s) in 1 file(s)", "declares 2"],
    ),
    "missing channel, unlabeled": (
        lambda d: image(d, "unl_1", 1).unlink(),
        ["imagesUn/unl_1_0000.nii.gz", "declares 2"],
    ),
    "first channel missing": (
        lambda d: image(d, "lab_0", 0).unlink(),
        ["imagesTr/lab_0: channels are 0001", "without gap"],
    ),
    "channel too many": (
        lambda d: write_volume(image(d, "lab_0", 2), voxels(77)),
        ["imagesTr/lab_0_0000.nii.gz", "3 channel(s) in 3 file(s)"],
    ),
    "label shape": (
        lambda d: write_volume(label(d), mask(shape=(6, 8, 9))),
        ["labelsTr/lab_0.nii.gz", "shape (6, 8, 9) instead of (6, 8, 7)"],
    ),
    "label spacing": (
        lambda d: other_affine(d, label(d), spacing=(1, 1, 1)),
        ["labelsTr/lab_0", "spacing (1.0, 1.0, 1.0)"],
    ),
    "label origin": (lambda d: other_affine(d, label(d), origin=(9, 0, 0)), ["labelsTr/lab_0", "origin (9.0", "copy"]),
    "label direction": (lambda d: other_affine(d, label(d), direction=ROTATED), ["labelsTr/lab_0", "direction"]),
    "channel shape": (
        lambda d: write_volume(image(d, "unl_0", 1), voxels(1, (6, 8, 9))),
        ["imagesUn/unl_0_0001.nii.gz", "differs from the first channel in shape"],
    ),
    "channel spacing": (lambda d: other_affine(d, image(d, "unl_0", 1), spacing=(1, 1, 1)), ["unl_0_0001", "spacing"]),
    "channel origin": (lambda d: other_affine(d, image(d, "lab_0", 1), origin=(0, 5, 0)), ["lab_0_0001", "origin"]),
    "channel direction": (
        lambda d: other_affine(d, image(d, "lab_0", 1), direction=ROTATED),
        ["lab_0_0001", "direction"],
    ),
    "undeclared label": (
        lambda d: write_volume(label(d), mask((1, 2, 3))),
        ["labelsTr/lab_0.nii.gz: label holds the value(s) 3, dataset.json declares 0, 1, 2"],
    ),
    "mask of 255": (lambda d: write_volume(label(d), mask((255,))), ["value(s) 255", "rewritten as 0 and 1"]),
    "fractional label": (lambda d: write_volume(label(d), mask().astype(np.float32) * 0.5), ["value(s) 0.5, dataset"]),
    "every label empty": (empty_all_labels, ["labelsTr: every label is empty"]),
    "image without label": (lambda d: label(d).unlink(), ["labelsTr/lab_0.nii.gz: case has no label", "imagesUn"]),
    "label without image": (
        lambda d: write_volume(label(d, "ghost"), mask()),
        ["labelsTr/ghost.nii.gz", "without image"],
    ),
    "label of an unlabeled case": (
        lambda d: write_volume(label(d, "unl_0"), mask()),
        ["labelsTr/unl_0.nii.gz", "move its image from imagesUn to imagesTr"],
    ),
    "labeled and unlabeled": (
        lambda d: shutil.copytree(d / "imagesTr", d / "imagesUn", dirs_exist_ok=True),
        ["lab_0: case is labeled and unlabeled", "lab_2: case is"],
    ),
    "labeled image is a test image": (
        lambda d: [shutil.copy(image(d, "lab_0", c), image(d, "tst_0", c)) for c in (0, 1)],
        ["imagesTr/lab_0: labeled image is also a test image: imagesTs/tst_0"],
    ),
    "name without channel": (
        lambda d: write_volume(d / "imagesUn" / "stray.nii.gz", voxels(9)),
        ["imagesUn/stray.nii.gz: name does not match <case>_XXXX.nii.gz"],
    ),
    "hidden file": (
        lambda d: (d / "imagesUn" / "._unl_0_0000.nii.gz").write_text("resource fork"),
        ["imagesUn/._unl_0_0000.nii.gz: hidden file"],
    ),
    "mixed endings": (
        lambda d: write_volume(d / "imagesTr" / "lab_9_0000.nrrd", voxels(9)),
        ["imagesTr/lab_9_0000.nrrd: other format than file_ending .nii.gz"],
    ),
    "ending in capitals": (
        lambda d: move(image(d, "unl_0", 1), d / "imagesUn" / "unl_0_0001.NII.GZ"),
        ["imagesUn/unl_0_0001.NII.GZ: other format", "imagesUn/unl_0_0000.nii.gz"],
    ),
    "broken link": (link_to_nothing, ["imagesUn/unl_0_0000.nii.gz: is a link to gone.nii.gz"]),
    "empty file": (lambda d: image(d, "unl_0").write_bytes(b""), ["imagesUn/unl_0_0000.nii.gz: file is empty"]),
    "truncated image": (lambda d: truncate(image(d, "unl_0")), ["imagesUn/unl_0_0000.nii.gz: file is truncated"]),
    "truncated label": (lambda d: truncate(label(d)), ["labelsTr/lab_0.nii.gz: file is truncated"]),
    "no image at all": (lambda d: image(d).write_text("hello"), ["imagesTr/lab_0_0000.nii.gz: file is truncated or"]),
    "4D": (four_dimensional, ["imagesUn/unl_0_0000.nii.gz: is not one 2D or 3D scalar image"]),
    "2D among 3D": (
        lambda d: [write_volume(image(d, "unl_0", c), voxels(c, (8, 7))) for c in (0, 1)],
        ["imagesUn/unl_0: image is 2D, 5 of 6 cases are 3D"],
    ),
    "no labeled case": (
        lambda d: [shutil.rmtree(d / part) for part in ("imagesTr", "labelsTr")],
        ["no labeled case"],
    ),
}


@pytest.mark.parametrize(("spoil", "told"), ERRORS.values(), ids=ERRORS)
def test_errors(tmp_path, spoil, told):
    folder = make_raw(tmp_path / "Dataset001_X", channels=2)
    spoil(folder)
    report = errors_of(folder)
    for expected in told:
        assert expected in report


WARNINGS: dict[str, tuple[Spoil, list[str]]] = {
    "class in no label": (
        lambda d: [write_volume(label(d, f"lab_{i}"), mask((1,))) for i in range(3)],
        ["labelsTr: no label contains posterior (2); it cannot be learned"],
    ),
    "name of a test case": (
        lambda d: write_volume(d / "imagesTs" / "lab_0_0000.nii.gz", voxels(99)),
        ["lab_0: a case of this name is in imagesTs and in imagesTr"],
    ),
    "broken test image": (
        lambda d: image(d, "tst_0").write_bytes(b""),
        ["imagesTs/tst_0_0000.nii.gz: file is empty (0 bytes)"],
    ),
    "wrong number of cases": (
        lambda d: write_dataset_json(d, numTraining=5),
        ["dataset.json: numTraining is 5, but there are 3 labeled cases; correct the number"],
    ),
    "stray file": (
        lambda d: (d / "imagesUn" / "readme.txt").write_text("hello"),
        ["imagesUn: 1 entries are not used: readme.txt"],
    ),
}


@pytest.mark.parametrize(("spoil", "told"), WARNINGS.values(), ids=WARNINGS)
def test_warnings(tmp_path, spoil, told):
    folder = make_raw(tmp_path / "Dataset001_X")
    spoil(folder)
    assert check(folder) == told


SUSPICIOUS: dict[str, tuple[Spoil, str]] = {
    "constant image": (
        lambda d: write_volume(image(d, "unl_0"), np.full(SHAPE, 7, np.float32)),
        "imagesUn/unl_0_0000.nii.gz: image is constant, every voxel is 7",
    ),
    "empty label": (
        lambda d: write_volume(label(d), mask(())),
        "labelsTr/lab_0.nii.gz: label is empty, no foreground",
    ),
    "labeled twice": (
        lambda d: shutil.copy(image(d, "lab_0"), image(d, "lab_2")),
        "imagesTr/lab_0: same image as imagesTr/lab_2",
    ),
    "labeled and unlabeled content": (
        lambda d: shutil.copy(image(d, "lab_0"), image(d, "unl_1")),
        "imagesTr/lab_0: same image as imagesUn/unl_1",
    ),
    "unlabeled and test content": (
        lambda d: shutil.copy(image(d, "unl_1"), image(d, "tst_0")),
        "imagesUn/unl_1: same image as imagesTs/tst_0; training will see the test image (without label)",
    ),
    "same content, other compression": (
        lambda d: sitk.WriteImage(sitk.ReadImage(str(image(d, "lab_0"))), str(image(d, "unl_1")), True, 1),
        "imagesTr/lab_0: same image as imagesUn/unl_1",
    ),
}


@pytest.mark.parametrize(("spoil", "told"), SUSPICIOUS.values(), ids=SUSPICIOUS)
def test_what_is_suspicious_has_to_be_allowed(tmp_path, spoil, told):
    folder = make_raw(tmp_path / "Dataset001_X")
    spoil(folder)
    report = errors_of(folder)
    assert "found 1 suspicious finding(s)" in report
    assert f"suspicious: {told}" in report
    assert "--allow_suspicious" in report
    assert check(folder, allow_suspicious=True) == [told]


def test_an_error_is_not_allowed(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X")
    write_volume(label(folder), mask(()))
    image(folder, "unl_0").write_bytes(b"")
    with pytest.raises(UserError) as error:
        check(folder, allow_suspicious=True)
    assert "1 error(s) and 1 suspicious finding(s)" in str(error.value)
    assert "--allow_suspicious" not in str(error.value)


def test_sheared_axes_are_a_warning(tmp_path):
    folder = tmp_path / "Dataset001_X"
    write_dataset_json(folder, numTraining=1, file_ending=".mha")
    sheared = (1, 0.3, 0, 0, 1, 0, 0, 0, 1)
    write_volume(folder / "imagesTr" / "a_0000.mha", voxels(0), direction=sheared)
    write_volume(folder / "labelsTr" / "a.mha", mask(), direction=sheared)
    assert check(folder) == [
        "imagesTr/a_0000.mha: direction of the voxel axes is not orthonormal: distances in mm will be wrong"
    ]


@pytest.mark.parametrize("part", ["imagesTr", "imagesUn", "labelsTr"])
def test_values_that_are_no_numbers(tmp_path, part):
    """SimpleITK passes them on from .mha files and takes them for 0 in NIfTI files."""
    broken = mask().astype(np.float32) if part == "labelsTr" else voxels(5)
    broken[2, 3, 4], broken[2, 3, 5] = np.nan, -np.inf
    for ending in (".mha", ".nii.gz"):
        folder = tmp_path / f"Dataset001_{ending[1:4]}"
        write_dataset_json(folder, numTraining=1, file_ending=ending)
        write_volume(folder / "imagesTr" / f"a_0000{ending}", voxels(0))
        write_volume(folder / "labelsTr" / f"a{ending}", mask())
        name = f"a{ending}" if part == "labelsTr" else f"{'a' if part == 'imagesTr' else 'u'}_0000{ending}"
        write_volume(folder / part / name, broken)
        if ending == ".mha":
            told = "label holds NaN or infinite" if part == "labelsTr" else "holds 1 NaN and 1 infinite values"
            assert f"error: {part}/{name}: {told}" in errors_of(folder)
        else:
            assert "--allow_suspicious" in errors_of(folder)
            assert check(folder, allow_suspicious=True) == [
                f"{part}/{name}: holds 2 NaN or infinite values, which nnU-Net's reader takes for 0"
            ]


def test_constant_images_are_no_duplicates(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X")
    for case in ("lab_0", "unl_0", "tst_0"):
        write_volume(image(folder, case), np.zeros(SHAPE, np.float32))
    told = check(folder, allow_suspicious=True)
    assert len(told) == 3
    assert all("image is constant" in text for text in told)


def test_one_image_as_two_channels(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X", channels=2)
    shutil.copy(image(folder, "unl_0", 0), image(folder, "unl_0", 1))
    assert check(folder) == ["imagesUn/unl_0_0000.nii.gz: the same image is also channel unl_0_0001.nii.gz"]


@pytest.mark.parametrize("unlabeled", [0, 2])
def test_sound_data_set(tmp_path, unlabeled):
    assert check(make_raw(tmp_path / "Dataset001_X", unlabeled=unlabeled, channels=2)) == []


def test_all_problems_are_told_at_once_errors_first(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X", unlabeled=2)
    write_volume(image(folder, "lab_0"), np.full(SHAPE, 3, np.float32))
    image(folder, "unl_0").write_bytes(b"")
    label(folder, "lab_1").unlink()
    lines = [line.strip() for line in errors_of(folder).splitlines()]
    assert lines[0] == "the integrity check of Dataset001_X found 2 error(s) and 1 suspicious finding(s)"
    assert lines[1].startswith("error: labelsTr/lab_1.nii.gz")
    assert lines[2].startswith("error: imagesUn/unl_0_0000.nii.gz")
    assert lines[3].startswith("suspicious: imagesTr/lab_0_0000.nii.gz")


def test_long_reports_are_cut(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X", unlabeled=0)
    for index in range(SHOWN_FINDINGS + 5):
        image(folder, "lab_0").with_name(f"stray{index}.nii.gz").touch()
    report = errors_of(folder)
    assert f"found {SHOWN_FINDINGS + 5} error(s)" in report
    assert "and 5 more" in report
    assert report.count("error: ") == SHOWN_FINDINGS


def test_worker_processes_find_the_same(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X")
    shutil.copy(image(folder, "lab_0"), image(folder, "unl_1"))
    raw = RawDataset.open(folder)
    assert check_dataset(raw, 2, True) == check_dataset(raw, 1, True) != []


def test_ignore_label_and_regions(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X", labeled=2)
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    write_dataset_json(folder, labels=labels, regions_class_order=[1, 2], numTraining=2)
    write_volume(label(folder), mask((1, 2, 3)))
    assert check(folder, allow_suspicious=True) == []
    write_volume(label(folder), mask((3,)))
    assert check(folder, allow_suspicious=True) == ["labelsTr/lab_0.nii.gz: label is empty, no foreground"]
    write_volume(label(folder), mask((1, 4)))
    assert "value(s) 4, dataset.json declares 0, 1, 2, 3" in errors_of(folder)


def test_explicit_files_need_no_channel_names(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X", labeled=0)
    write_volume(tmp_path / "scan_2019.nii.gz", voxels(40))
    write_volume(tmp_path / "seg.nii.gz", mask())
    files = {"images": ["../scan_2019.nii.gz"], "label": "../seg.nii.gz"}
    write_dataset_json(folder, dataset={"a": files}, numTraining=1)
    assert check(folder) == []
    (tmp_path / "scan_2019.nii.gz").unlink()
    assert "scan_2019.nii.gz: file not found" in errors_of(folder)


def test_no_label_of_an_unlabeled_case_is_touched(tmp_path):
    rules = CheckRules(object, 1, (0, 1), None)
    assert check_case("unlabeled", "a", [], None, rules).found_labels is None
    folder = make_raw(tmp_path / "Dataset001_X")
    poison = folder / "labelsUn" / "unl_0.nii.gz"
    poison.parent.mkdir()
    os.mkfifo(poison)  # opening it for reading would hang
    assert check(folder) == []


@pytest.mark.parametrize("color", [False, True])
def test_png(tmp_path, color):
    folder = tmp_path / "Dataset001_X"
    names = {"0": "R", "1": "G", "2": "B"} if color else {"0": "gray"}
    write_dataset_json(folder, channel_names=names, labels={"background": 0, "a": 1}, file_ending=".png", numTraining=2)
    generator = np.random.default_rng(0)
    for part in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / part).mkdir()
    for part, case in (("imagesTr", "a"), ("imagesTr", "b"), ("imagesUn", "c")):
        pixels = generator.integers(0, 255, (9, 8, 3) if color else (9, 8), dtype=np.uint8)
        io.imsave(folder / part / f"{case}_0000.png", pixels, check_contrast=False)
    for case in "ab":
        io.imsave(folder / "labelsTr" / f"{case}.png", mask((1,), (1, 9, 8))[0], check_contrast=False)
    assert check(folder) == []
    io.imsave(folder / "labelsTr" / "b.png", np.zeros((9, 8, 3), np.uint8), check_contrast=False)
    assert "labelsTr/b.png: label has 3 channels" in errors_of(folder)
    description = json.loads((folder / "dataset.json").read_text()) | {"channel_names": {"0": "a", "1": "b"}}
    (folder / "dataset.json").write_text(json.dumps(description))
    counted = "3 channel(s) in 1 file(s) ([3] per file)" if color else "1 channel(s) in 1 file(s)"
    assert f"imagesTr/a_0000.png: case has {counted}, channel_names of dataset.json declares 2" in errors_of(folder)
