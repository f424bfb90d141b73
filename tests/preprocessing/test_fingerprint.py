from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.preprocessing import fingerprint as module
from nnssl.preprocessing.content import content_keys
from nnssl.preprocessing.fingerprint import case_counts, class_evidence, class_values, make_fingerprint
from nnssl.utils.paths import preprocessed_folder
from tests.preprocessing.raw_data import NAME, SHAPE, write_dataset, write_image, write_label


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr(module, "SAMPLED_VOXELS_PER_CASE", 20_000)


@pytest.fixture
def analyzed(monkeypatch) -> list[str]:
    """Names of the cases that were read, in all runs of a test."""
    names: list[str] = []
    run = module.map_cases

    def recorded(function, jobs, **options):
        names.extend(jobs)
        return run(function, jobs, **options)

    monkeypatch.setattr(module, "map_cases", recorded)
    return names


def fingerprint(folder: Path, *, clean: bool = False) -> dict:
    raw = RawDataset.open(folder)
    cache = preprocessed_folder() / NAME / "manifests" / "content.json"
    return make_fingerprint(raw, content_keys(raw, cache, num_threads=1), num_processes=1, clean=clean)


def test_geometry_of_all_cases_intensities_of_labeled_ones(raw_root):
    folder = write_dataset(raw_root)
    larger = tuple(2 * size for size in SHAPE)
    write_image(folder, "u0", seed=5, shape=larger, spacing=(2.0, 2.0, 3.0))
    bright = sitk.ReadImage(str(folder / "imagesUn" / "u1_0000.nii.gz")) * 1000
    sitk.WriteImage(bright, str(folder / "imagesUn" / "u1_0000.nii.gz"))
    found = fingerprint(folder)
    assert len(found["spacings"]) == len(found["shapes_after_crop"]) == 5
    assert found["spacings"].count([3.0, 2.0, 2.0]) == 1
    assert found["shapes_after_crop"].count([size - 4 for size in larger]) == 1
    assert found["shapes_after_crop"].count([size - 4 for size in SHAPE]) == 4
    assert case_counts(found) == (2, 3)
    properties = found["foreground_intensity_properties_per_channel"]["0"]
    values = []
    for case in ("l0", "l1"):
        image = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "imagesTr" / f"{case}_0000.nii.gz")))
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "labelsTr" / f"{case}.nii.gz")))
        values.append(image[label > 0])
    values = np.concatenate(values)
    assert properties["mean"] == pytest.approx(values.mean(), rel=0.01)
    assert properties["max"] == values.max()
    assert properties["percentile_99_5"] == pytest.approx(np.percentile(values, 99.5), rel=0.01)


def test_equals_nnunet_where_all_cases_are_labeled(raw_root):
    folder = write_dataset(raw_root, labeled=2, unlabeled=0, channels=("T1", "CT"))
    ours = fingerprint(folder)
    extractor = DatasetFingerprintExtractor(NAME, num_processes=1)
    extractor.num_foreground_voxels_for_intensitystats = 2 * module.SAMPLED_VOXELS_PER_CASE
    extractor.show_progress_bar = False
    theirs = json.loads(json.dumps(extractor.run(overwrite_existing=True), default=lambda value: value.tolist()))
    for name in ("spacings", "shapes_after_crop", "median_relative_size_after_cropping"):
        assert ours[name] == theirs[name]
    for channel, properties in theirs["foreground_intensity_properties_per_channel"].items():
        assert ours["foreground_intensity_properties_per_channel"][channel] == pytest.approx(properties, rel=1e-6)


def test_second_run_reads_nothing(raw_root, analyzed):
    folder = write_dataset(raw_root)
    first = fingerprint(folder)
    assert set(analyzed) == {"l0", "l1", "u0", "u1", "u2"}
    analyzed.clear()
    assert fingerprint(folder) == first
    assert analyzed == []


def test_new_unlabeled_case_alone_is_read(raw_root, analyzed):
    folder = write_dataset(raw_root)
    first = fingerprint(folder)
    analyzed.clear()
    write_image(folder, "u9", seed=9, shape=(24, 24, 24))
    second = fingerprint(folder)
    assert analyzed == ["u9"]
    assert case_counts(second) == (2, 4)
    assert len(second["shapes_after_crop"]) == 6
    name = "foreground_intensity_properties_per_channel"
    assert second[name] == first[name]


def test_removed_case_is_dropped_without_reading(raw_root, analyzed):
    folder = write_dataset(raw_root)
    fingerprint(folder)
    analyzed.clear()
    (folder / "imagesUn" / "u0_0000.nii.gz").unlink()
    assert case_counts(fingerprint(folder)) == (2, 2)
    assert analyzed == []


def test_newly_labeled_case_renews_the_intensities(raw_root, analyzed):
    folder = write_dataset(raw_root)
    fingerprint(folder)
    analyzed.clear()
    (folder / "imagesUn" / "u0_0000.nii.gz").rename(folder / "imagesTr" / "u0_0000.nii.gz")
    write_label(folder, "u0")
    assert case_counts(fingerprint(folder)) == (3, 2)
    assert set(analyzed) == {"l0", "l1", "u0"}


def test_changed_image_is_read_again(raw_root, analyzed):
    folder = write_dataset(raw_root)
    fingerprint(folder)
    analyzed.clear()
    write_image(folder, "u1", seed=77)
    fingerprint(folder)
    assert analyzed == ["u1"]


def test_clean_reads_all(raw_root, analyzed):
    folder = write_dataset(raw_root)
    fingerprint(folder)
    analyzed.clear()
    fingerprint(folder, clean=True)
    assert len(analyzed) == 5


def test_fingerprint_of_stock_nnunet_is_replaced(raw_root, analyzed):
    folder = write_dataset(raw_root)
    file = preprocessed_folder() / NAME / "dataset_fingerprint.json"
    file.parent.mkdir(parents=True)
    file.write_text('{"spacings": [], "shapes_after_crop": []}')
    with pytest.raises(UserError, match="not made by nnssl"):
        case_counts(json.loads(file.read_text()))
    assert case_counts(fingerprint(folder)) == (2, 3)
    assert len(analyzed) == 5


def test_without_foreground_there_is_an_error(raw_root):
    folder = write_dataset(raw_root, labeled=1, unlabeled=0)
    empty = sitk.GetImageFromArray(np.zeros(SHAPE, dtype=np.uint8))
    sitk.WriteImage(empty, str(folder / "labelsTr" / "l0.nii.gz"))
    with pytest.raises(UserError, match="foreground"):
        fingerprint(folder)


def test_label_of_an_unlabeled_case_is_not_opened(raw_root):
    folder = write_dataset(raw_root)
    for place in ("labelsTr", "labelsUn"):
        (folder / place).mkdir(exist_ok=True)
        (folder / place / "u0.nii.gz").write_text("poison: no reader opens this")
    assert case_counts(fingerprint(folder)) == (2, 3)


def test_how_classes_look_and_lie_is_that_of_the_labeled_cases(raw_root):
    found = class_evidence(fingerprint(write_dataset(raw_root)))
    # the bright box lies before the dim one along all axes, and is 60 brighter in noise of 40
    assert found == {
        "labels": [1, 2],
        "votes_of": "labeled cases",
        "pairs": [{"labels": [1, 2], "overlap": 0.0, "votes": 2, "before": [2, 2, 2], "after": [0, 0, 0]}],
    }


def test_how_classes_lie_is_kept_until_a_labeled_case_changes(raw_root, analyzed):
    folder = write_dataset(raw_root)
    first = class_evidence(fingerprint(folder))
    write_image(folder, "u9", seed=9)
    analyzed.clear()
    assert class_evidence(fingerprint(folder)) == first
    assert analyzed == ["u9"]
    label = folder / "labelsTr" / "l1.nii.gz"
    image = sitk.ReadImage(str(label))
    turned = sitk.GetImageFromArray(sitk.GetArrayFromImage(image)[::-1])
    turned.CopyInformation(image)
    sitk.WriteImage(turned, str(label))
    (pair,) = class_evidence(fingerprint(folder))["pairs"]
    assert (pair["before"], pair["after"]) == ([1, 2, 2], [1, 0, 0])


def test_scans_of_a_patient_vote_together(raw_root, analyzed):
    folder = write_dataset(raw_root)
    fingerprint(folder)
    analyzed.clear()
    (folder / "groups.json").write_text(json.dumps({"l0": "A", "l1": "A", "u0": "A"}))
    found = class_evidence(fingerprint(folder))
    assert set(analyzed) == {"l0", "l1"}
    assert found["votes_of"] == "groups of labeled cases"
    assert found["pairs"][0]["votes"] == 1
    analyzed.clear()
    assert class_evidence(fingerprint(folder)) == found
    assert analyzed == []


def test_a_class_that_becomes_the_ignore_label_is_left_out(raw_root):
    folder = write_dataset(raw_root)
    assert len(class_evidence(fingerprint(folder))["pairs"]) == 1
    content = json.loads((folder / "dataset.json").read_text())
    content["labels"] = {"background": 0, "bright": 1, "ignore": 2}
    (folder / "dataset.json").write_text(json.dumps(content))
    found = class_evidence(fingerprint(folder))
    assert (found["labels"], found["pairs"]) == ([1], [])


def test_regions_are_taken_apart():
    assert class_values({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "rim": 3, "ignore": 4}) == [1, 2, 3]


def test_fingerprint_without_classes_is_refused():
    with pytest.raises(UserError, match="how the classes lie"):
        class_evidence({"provenance": {"num_labeled": 1, "num_unlabeled": 0}})
