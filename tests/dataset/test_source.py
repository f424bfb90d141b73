from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from skimage import io

from nnssl.dataset.source import open_source
from nnssl.errors import UserError

from .synthetic import make_raw, make_source, mask, voxels, write_volume


def open_folder(folder, **options):
    return open_source(folder, **{"channel_names": ["MRI"], "num_processes": 1, **options})


def make_png_source(folder, values=(0, 1), color=False):
    generator = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for case in ("a", "b"):
        pixels = generator.integers(0, 255, (9, 8, 3) if color else (9, 8), dtype=np.uint8)
        io.imsave(folder / "images" / f"{case}.png", pixels, check_contrast=False)
        label = np.full((9, 8), values[0], np.uint8)
        label[2:4] = values[1]
        io.imsave(folder / "labels" / f"{case}.png", label, check_contrast=False)
    return folder


@pytest.mark.parametrize("suffix", ["", "_0000"])
def test_folder_with_split(tmp_path, suffix):
    source = open_folder(make_source(tmp_path / "s", ["c2", "c1"], ["t1"], suffix))
    assert (source.pool, source.test, source.unlabeled) == (["c1", "c2"], ["t1"], [])
    assert source.images["c1"] == [str(tmp_path / "s" / "images" / f"c1{suffix}.nii.gz")]
    assert source.labels["t1"] == str(tmp_path / "s" / "labels" / "t1.nii.gz")
    assert source.dataset_json == {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "label_1": 1, "label_2": 2},
        "file_ending": ".nii.gz",
    }
    assert source.label_map is None
    assert source.remarks == []


def test_without_split_all_can_be_drawn_and_four_digits_may_be_the_case(tmp_path):
    source = open_folder(make_source(tmp_path, ["scan_0001", "scan_0002"]))
    assert source.pool == ["scan_0001", "scan_0002"]


def test_several_channels(tmp_path):
    make_source(tmp_path, ["a", "b"], suffix="_0000")
    for case in "ab":
        write_volume(tmp_path / "images" / f"{case}_0001.nii.gz", voxels(9))
    source = open_folder(tmp_path, channel_names=["T1", "FLAIR"])
    assert source.dataset_json["channel_names"] == {"0": "T1", "1": "FLAIR"}
    assert [len(files) for files in source.images.values()] == [2, 2]
    (tmp_path / "images" / "b_0001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"(?s)numbers of channels.*b_0000"):
        open_folder(tmp_path, channel_names=["T1", "FLAIR"])


def test_images_that_never_had_a_label(tmp_path):
    make_source(tmp_path, ["a", "b"])
    write_volume(tmp_path / "images_unlabeled" / "u.nii.gz", voxels(5))
    source = open_folder(tmp_path)
    assert (source.pool, source.unlabeled) == (["a", "b"], ["u"])
    assert "u" not in source.labels
    shutil.copy(tmp_path / "images" / "a.nii.gz", tmp_path / "images_unlabeled" / "a.nii.gz")
    with pytest.raises(UserError, match="same case name"):
        open_folder(tmp_path)


def test_cases_outside_the_split_are_left_out_and_told(tmp_path):
    make_source(tmp_path, ["a", "b"], ["t"])
    (tmp_path / "split.json").write_text(json.dumps({"train": ["a"], "test": ["t"]}))
    source = open_folder(tmp_path)
    assert (list(source.images), list(source.labels)) == (["a", "t"], ["a", "t"])
    assert source.left_out == ["b"]
    assert "1 case(s) are neither train nor test" in source.remarks[0]


def test_labels_file_of_the_folder_and_of_the_user(tmp_path):
    make_source(tmp_path, ["a"])
    named = {"background": 0, "front": 1, "back": 2, "never": 3}
    (tmp_path / "labels.json").write_text(json.dumps(named))
    assert open_folder(tmp_path).dataset_json["labels"] == named
    (tmp_path / "mine.json").write_text(json.dumps({"background": 0, "x": 1, "y": 2}))
    assert open_folder(tmp_path, labels_file=tmp_path / "mine.json").dataset_json["labels"]["x"] == 1
    (tmp_path / "mine.json").write_text(json.dumps({"background": 0, "x": 1}))
    with pytest.raises(UserError, match=r"(?s)does not declare.*found: +2"):
        open_folder(tmp_path, labels_file=tmp_path / "mine.json")


def test_classes_are_found_in_all_labels_in_workers_too(tmp_path):
    make_source(tmp_path, ["a", "b"], ["t"])
    write_volume(tmp_path / "labels" / "t.nii.gz", mask((1, 2, 3)))
    assert list(open_folder(tmp_path, num_processes=2).dataset_json["labels"].values()) == [0, 1, 2, 3]


@pytest.mark.parametrize(("color", "names"), [(False, ["gray"]), (True, ["R", "G", "B"])])
def test_png_names_its_channels(tmp_path, color, names):
    source = open_folder(make_png_source(tmp_path / "s", color=color), channel_names=None)
    assert list(source.dataset_json["channel_names"].values()) == names
    assert source.dataset_json["file_ending"] == ".png"
    assert source.label_map is None


@pytest.mark.parametrize("named", [False, True])
def test_masks_of_255_are_translated(tmp_path, named):
    folder = make_png_source(tmp_path / "s", values=(0, 255))
    if named:
        (folder / "labels.json").write_text(json.dumps({"background": 0, "head": 1}))
    source = open_folder(folder, channel_names=None)
    assert source.label_map == {0: 0, 255: 1}
    assert source.dataset_json["labels"] == {"background": 0, "head" if named else "label_1": 1}
    assert "written anew" in source.remarks[0]


def test_raw_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = make_raw(tmp_path / "Dataset003_Three")
    shutil.copytree(folder / "labelsTr", folder / "labelsTs")
    (folder / "labelsTs" / "lab_0.nii.gz").rename(folder / "labelsTs" / "tst_0.nii.gz")
    for reference in (folder, "3", "Dataset003_Three"):
        source = open_source(reference)
        assert (source.pool, source.unlabeled, source.test) == (
            ["lab_0", "lab_1", "lab_2"],
            ["unl_0", "unl_1"],
            ["tst_0"],
        )
        assert source.labels["tst_0"] == str(folder / "labelsTs" / "tst_0.nii.gz")
        assert "numTraining" not in source.dataset_json
    with pytest.raises(UserError, match="are those of its"):
        open_source(folder, channel_names=["CT"])
    (folder / "labelsTr" / "lab_1.nii.gz").unlink()
    with pytest.raises(UserError, match=r"(?s)lack their label.*lab_1"):
        open_source(folder)


def no_images(folder):
    shutil.rmtree(folder / "images")


def empty_images(folder):
    no_images(folder)
    (folder / "images").mkdir()


SPOILED = {
    "no images": (no_images, {}, "not a source of labeled cases"),
    "empty images": (empty_images, {}, "no images"),
    "no label": (lambda d: (d / "labels" / "a.nii.gz").unlink(), {}, "images without label"),
    "mixed endings": (lambda d: write_volume(d / "images" / "c.mha", voxels(1)), {}, "same file ending"),
    "other format": (lambda d: (d / "images" / "c.txt").touch(), {}, "unknown format"),
    "no channel name": (lambda d: None, {"channel_names": None}, "--channel-names"),
    "channel too many": (lambda d: None, {"channel_names": ["a", "b"]}, "number of channel names"),
    "gap in labels": (lambda d: write_volume(d / "labels" / "a.nii.gz", mask((1, 2, 5))), {}, "not consecutive"),
    "fractional labels": (
        lambda d: write_volume(d / "labels" / "a.nii.gz", mask().astype(np.float32) / 2),
        {},
        "not non-negative integers",
    ),
    "only background": (
        lambda d: [write_volume(d / "labels" / f"{case}.nii.gz", mask(())) for case in "ab"],
        {},
        "not consecutive",
    ),
    "broken label": (lambda d: (d / "labels" / "a.nii.gz").write_bytes(b""), {}, "0 bytes"),
    "broken image": (lambda d: (d / "images" / "a.nii.gz").write_bytes(b"x"), {}, "no reader"),
    "split without lists": (lambda d: (d / "split.json").write_text('{"test": ["a"]}'), {}, "lacks its lists"),
    "split that repeats": (lambda d: (d / "split.json").write_text('{"train": ["a", "a"]}'), {}, "cases twice"),
    "split of ghosts": (lambda d: (d / "split.json").write_text('{"train": ["z"]}'), {}, "cases without image"),
    "split overlaps": (
        lambda d: (d / "split.json").write_text('{"train": ["a"], "test": ["a"]}'),
        {},
        "cases twice",
    ),
    "invalid labels file": (lambda d: (d / "labels.json").write_text('{"0": "background"}'), {}, "turn name and value"),
}


@pytest.mark.parametrize(("spoil", "options", "message"), SPOILED.values(), ids=SPOILED)
def test_spoiled_folders(tmp_path, spoil, options, message):
    folder = make_source(tmp_path / "s", ["a", "b"])
    spoil(folder)
    with pytest.raises(UserError) as error:
        open_folder(folder, **options)
    assert message in str(error.value)
