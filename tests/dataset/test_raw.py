from __future__ import annotations

import json
import shutil

import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnssl.dataset.raw import RawDataset, declared_values, list_cases, validate_dataset_json
from nnssl.errors import UserError

from .synthetic import make_raw, write_dataset_json

VALID = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "liver": 1},
    "numTraining": 1,
    "file_ending": ".nii.gz",
}


def test_lists_labeled_unlabeled_and_test_cases(tmp_path):
    raw = RawDataset.open(make_raw(tmp_path / "Dataset001_X", channels=2))
    assert list(raw.labeled) == ["lab_0", "lab_1", "lab_2"]
    assert list(raw.unlabeled) == ["unl_0", "unl_1"]
    assert list(raw.test) == ["tst_0"]
    images, label = raw.labeled["lab_1"]
    assert [image.rsplit("/", 1)[1] for image in images] == ["lab_1_0000.nii.gz", "lab_1_0001.nii.gz"]
    assert label.endswith("labelsTr/lab_1.nii.gz")
    assert len(raw.unlabeled["unl_0"]) == 2
    assert (raw.name, raw.num_channels, raw.label_values, raw.ignore_label) == ("Dataset001_X", 2, [0, 1, 2], None)


def test_labeled_cases_are_those_of_nnunet(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X", labeled=4, channels=2)
    expected = get_filenames_of_train_images_and_targets(str(folder))
    labeled = RawDataset.open(folder).labeled
    assert {case: {"images": files.images, "label": files.label} for case, files in labeled.items()} == expected
    assert list(labeled) == list(expected)


def test_case_name_may_contain_digits_like_a_channel(tmp_path):
    (tmp_path / "scan_0001_0000.nii.gz").touch()
    (tmp_path / "scan_0001.nii").touch()
    assert list(list_cases(tmp_path, ".nii.gz")) == ["scan_0001"]


@pytest.mark.parametrize("make_empty", [True, False])
def test_unlabeled_folder_may_be_empty_or_missing(tmp_path, make_empty):
    folder = make_raw(tmp_path / "Dataset001_X", unlabeled=0, test=0)
    if make_empty:
        (folder / "imagesUn").mkdir()
    raw = RawDataset.open(folder)
    assert raw.unlabeled == {}
    assert raw.test == {}


def test_opens_by_id_name_and_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    folder = make_raw(tmp_path / "Dataset007_Seven")
    for reference in (7, "7", "007", "Dataset007_Seven", folder, str(folder)):
        assert RawDataset.open(reference).folder == folder


@pytest.mark.parametrize("reference", ["Dataset008_Absent", "no/such/folder"])
def test_missing_folder_is_named(tmp_path, monkeypatch, reference):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    with pytest.raises(UserError, match=reference):
        RawDataset.open(reference)


def test_missing_dataset_json(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.json"):
        RawDataset.open(tmp_path)


def test_explicit_files_of_dataset_json(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X")
    shutil.move(folder / "imagesTr" / "lab_0_0000.nii.gz", tmp_path / "elsewhere.nii.gz")
    files = {"images": ["../elsewhere.nii.gz"], "label": "labelsTr/lab_0.nii.gz"}
    write_dataset_json(folder, numTraining=1, dataset={"anna": files})
    raw = RawDataset.open(folder)
    assert raw.has_explicit_files
    assert raw.labeled == {"anna": ([str(tmp_path / "elsewhere.nii.gz")], str(folder / "labelsTr" / "lab_0.nii.gz"))}
    # the entry itself stays relative
    assert raw.dataset_json["dataset"]["anna"] == files


def test_reader_is_found_although_the_first_image_is_broken(tmp_path, capfd):
    folder = make_raw(tmp_path / "Dataset001_X")
    (folder / "imagesTr" / "lab_0_0000.nii.gz").write_bytes(b"")
    assert RawDataset.open(folder).reader_writer_class().__name__ == "SimpleITKIO"
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({"background": 0, "liver": 1}, None),
        ({"background": 0, "liver": 1, "tumor": 2, "ignore": 3}, None),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}, [1, 2, 3]),
        ({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, [1, 2]),
    ],
)
def test_valid_labels_are_valid_for_nnunet_too(labels, order, tmp_path):
    validate_dataset_json({**VALID, "labels": labels, "regions_class_order": order}, tmp_path)
    manager = LabelManager(labels, order)
    ignored = [manager.ignore_label] if manager.has_ignore_label else []
    assert declared_values(labels) == [*manager.all_labels, *ignored]


INVALID = {
    "not an object": ([], "not an object"),
    "no channels": ({"channel_names": None}, "lacks channel_names"),
    "version 1": ({"channel_names": None, "modality": {"0": "MRI"}}, "nnUNetv2_convert_old_nnUNet_dataset"),
    "no labels": ({"labels": None}, "lacks labels"),
    "channel list": ({"channel_names": ["MRI"]}, "name per channel"),
    "empty channels": ({"channel_names": {}}, "name per channel"),
    "channel gap": ({"channel_names": {"0": "a", "2": "b"}}, "channel numbers"),
    "channel order": ({"channel_names": {"1": "a", "0": "b"}}, "channel numbers"),
    "labels turned round": ({"labels": {"0": "background", "1": "liver"}}, "turn name and value round"),
    "label is a float": ({"labels": {"background": 0, "liver": 1.5}}, "integer"),
    "label is negative": ({"labels": {"background": 0, "liver": -1}}, "integer"),
    "no background": ({"labels": {"liver": 1, "tumor": 2}}, "background"),
    "background is 1": ({"labels": {"background": 1, "liver": 0}}, "background"),
    "gap in labels": ({"labels": {"background": 0, "liver": 1, "tumor": 3}}, "consecutive"),
    "only background": ({"labels": {"background": 0}}, "no foreground"),
    "ignore in between": ({"labels": {"background": 0, "ignore": 1, "liver": 2}}, "ignore label"),
    "regions without order": ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "regions_class_order"),
    "regions, short order": (
        {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1]},
        "2 values, for whole, core",
    ),
    "number is text": ({"numTraining": "4"}, "numTraining"),
    "unknown ending": ({"file_ending": ".jpg"}, "file_ending"),
    "ending without dot": ({"file_ending": "nii.gz"}, "file_ending"),
    "explicit list": ({"dataset": ["a"]}, '"dataset"'),
    "explicit without label": ({"dataset": {"a": {"images": ["x"]}}}, "case 'a'"),
    "explicit without images": ({"dataset": {"a": {"images": [], "label": "y"}}}, "case 'a'"),
}


@pytest.mark.parametrize(("change", "message"), INVALID.values(), ids=INVALID)
def test_invalid_dataset_json(tmp_path, change, message):
    description = change
    if isinstance(change, dict):
        description = {key: value for key, value in {**VALID, **change}.items() if value is not None}
    (tmp_path / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(UserError) as error:
        RawDataset.open(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path / "dataset.json") in str(error.value)
