from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import blosc2
import pytest
import SimpleITK as sitk

from nnssl.errors import UserError
from nnssl.preprocessing.pipeline import prepare_dataset
from nnssl.utils.paths import preprocessed_folder
from tests.preprocessing.raw_data import NAME, set_folders, write_dataset

CPU = "nnSSLPlannerCPU"


def test_everything_that_training_needs_is_there(raw_root):
    write_dataset(raw_root)
    told: list[str] = []
    done = prepare_dataset(NAME, planner=CPU, tell=told.append)
    folder = preprocessed_folder() / NAME
    assert (done.dataset, done.num_labeled, done.num_unlabeled) == (NAME, 2, 3)
    assert done.planned == ("2d", "3d_fullres")
    assert [(outcome.configuration, outcome.made) for outcome in done.outcomes] == [("2d", 5), ("3d_fullres", 5)]
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "dataset.json",
        "dataset_fingerprint.json",
        "gt_segmentations",
        "manifests",
        "nnSSLCPUPlans.json",
        "nnSSLCPUPlans_2d",
        "nnSSLCPUPlans_2d_unlabeled",
        "nnSSLCPUPlans_3d_fullres",
        "nnSSLCPUPlans_3d_fullres_unlabeled",
        "splits_final.json",
    }
    assert len(json.loads((folder / "splits_final.json").read_text())) == 2
    assert len(told) == 5
    assert [outcome.made for outcome in prepare_dataset(801, planner=CPU).outcomes] == [0, 0]


def test_2d_images_with_three_channels(raw_root):
    write_dataset(
        raw_root, shape=(40, 48), channels=("R", "G", "B"), ending=".png", labels={"background": 0, "a": 1, "b": 2}
    )
    done = prepare_dataset(NAME, planner=CPU)
    assert done.planned == ("2d",)
    image = blosc2.open(str(preprocessed_folder() / NAME / "nnSSLCPUPlans_2d_unlabeled" / "u0.b2nd"), mode="r")
    assert image.shape == (3, 1, 36, 44)


def test_one_labeled_case(raw_root):
    write_dataset(raw_root, labeled=1, unlabeled=2)
    done = prepare_dataset(NAME, planner=CPU, configurations=["3d_fullres"])
    assert done.outcomes[0].made == 3
    assert not (preprocessed_folder() / NAME / "splits_final.json").exists()


def test_planner_of_nnunet(raw_root):
    write_dataset(raw_root)
    done = prepare_dataset(NAME, planner="ExperimentPlanner", configurations=["3d_fullres"])
    assert done.plans["plans_name"] == "nnUNetPlans"
    assert done.outcomes[0].made == 5
    assert (preprocessed_folder() / NAME / "nnUNetPlans_3d_fullres_unlabeled" / "u2.b2nd").is_file()


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Files that Python opens, and those that SimpleITK reads."""
    names: list[str] = []
    sys.addaudithook(lambda event, args: names.append(str(args[0])) if event == "open" else None)
    read = sitk.ReadImage
    monkeypatch.setattr(sitk, "ReadImage", lambda file, *args: names.append(str(file)) or read(file, *args))
    return names


def test_labels_of_unlabeled_cases_are_not_opened(raw_root, opened):
    folder = write_dataset(raw_root)
    (folder / "labelsUn").mkdir()
    poisoned = [folder / place / f"u{i}.nii.gz" for place in ("labelsTr", "labelsUn") for i in range(3)]
    for file in poisoned:
        file.write_text("poison: no reader opens this")
    with pytest.raises(UserError, match="label without image"):
        prepare_dataset(NAME, planner=CPU)
    opened.clear()
    prepare_dataset(NAME, planner=CPU, check_integrity=False)
    assert str(folder / "labelsTr" / "l0.nii.gz") in opened
    assert str(folder / "imagesUn" / "u0_0000.nii.gz") in opened
    assert not {str(file) for file in poisoned} & set(opened)
    assert {f.name for f in (preprocessed_folder() / NAME / "gt_segmentations").iterdir()} == {"l0.nii.gz", "l1.nii.gz"}


def test_integrity_check_comes_first(raw_root):
    folder = write_dataset(raw_root)
    (folder / "labelsTr" / "l0.nii.gz").unlink()
    with pytest.raises(UserError, match="l0"):
        prepare_dataset(NAME, planner=CPU)
    assert not (preprocessed_folder() / NAME / "dataset_fingerprint.json").exists()


def test_without_preprocessing(raw_root):
    write_dataset(raw_root)
    done = prepare_dataset(NAME, planner=CPU, preprocess=False)
    assert done.outcomes == ()
    assert not (preprocessed_folder() / NAME / "nnSSLCPUPlans_2d").exists()


def test_unknown_configuration_is_told_and_unplanned_one_left_out(raw_root):
    write_dataset(raw_root)
    with pytest.raises(UserError, match="3d_fulres"):
        prepare_dataset(NAME, planner=CPU, configurations=["3d_fulres"])
    assert prepare_dataset(NAME, planner=CPU, configurations=["3d_lowres"]).outcomes == ()


def test_data_set_without_labels_is_refused(raw_root):
    write_dataset(raw_root, labeled=0)
    with pytest.raises(UserError, match="no labeled case"):
        prepare_dataset(NAME, planner=CPU, check_integrity=False)


def _data_folder() -> Path:
    given = os.environ.get("NNSSL_TEST_DATA")
    return Path(given) if given else Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.mark.data
def test_hippocampus(tmp_path, monkeypatch):
    source = _data_folder() / "hippocampus"
    if not source.is_dir():
        pytest.skip(f"no hippocampus data in {source.parent}; set NNSSL_TEST_DATA")
    folder = set_folders(tmp_path, monkeypatch) / "Dataset044_Hippocampus"
    for part in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / part).mkdir(parents=True)
    for number, case in enumerate(json.loads((source / "split.json").read_text())["train"][:10]):
        part = "imagesTr" if number < 2 else "imagesUn"
        (folder / part / f"{case}_0000.nii.gz").symlink_to(source / "images" / f"{case}.nii.gz")
        if part == "imagesTr":
            (folder / "labelsTr" / f"{case}.nii.gz").symlink_to(source / "labels" / f"{case}.nii.gz")
    content = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    done = prepare_dataset(44, planner=CPU, configurations=["3d_fullres"])
    configuration = done.plans["configurations"]["3d_fullres"]
    assert configuration["patch_size"] == [40, 56, 40]
    assert configuration["spacing"] == [1.0, 1.0, 1.0]
    # anterior and posterior look alike and lie one before the other, and with two cases there may be a third axis
    mirrored = configuration["semi_supervised"]
    assert set(mirrored["mirror_axes"]) <= {2}
    assert {kept["axis"] for kept in mirrored["mirror_evidence"]["kept"]} >= {0, 1}
    assert (done.outcomes[0].made, done.num_labeled, done.num_unlabeled) == (10, 2, 8)
    assert prepare_dataset(44, planner=CPU, configurations=["3d_fullres"]).outcomes[0].made == 0
