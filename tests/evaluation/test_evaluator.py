from __future__ import annotations

import json
import os

import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnssl.errors import UserError
from nnssl.evaluation.cases import CaseResult
from nnssl.evaluation.evaluator import evaluate_folders
from nnssl.evaluation.labels import EvaluationLabels
from nnssl.evaluation.metrics import ClassScore, compare_label_maps, metric_names

from .files import LABELS, SHAPE, SPACING, label_map, make_folders, write_labels

REGIONS = {
    "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
    "regions_class_order": [1, 2],
}
ROTATED = (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def evaluate(folders, *arguments, **options):
    return evaluate_folders(*folders, *arguments, **({"num_processes": 1} | options))


def failure_of(folders, *arguments, **options) -> str:
    with pytest.raises(UserError) as error:
        evaluate(folders, *arguments, **options)
    return str(error.value)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_scores_of_every_case_and_class(tmp_path, ending):
    result = evaluate(make_folders(tmp_path, ending), nsd_tolerance_mm=(0.5, 2))
    assert result.per_case["case"].tolist() == ["a", "a", "b", "b", "c", "c"]
    assert result.per_case["class"].tolist() == ["left", "right"] * 3
    names = metric_names((0.5, 2))
    for (_, rows), seed in zip(result.per_case.groupby("case"), range(3), strict=True):
        maps = label_map(seed), label_map(seed, 0.4)
        expected = compare_label_maps(*maps, SPACING[::-1], {"1": (1,), "2": (2,)}, tolerances_mm=(0.5, 2))
        for (_, row), key in zip(rows.iterrows(), expected, strict=True):
            assert row[names].tolist() == pytest.approx([expected[key].metrics[name] for name in names])
    assert result.notes == []


def test_means(tmp_path):
    result = evaluate(make_folders(tmp_path))
    for name in metric_names((1.0,)):
        means = [result.per_case.loc[result.per_case["class"] == c, name].mean() for c in ("left", "right")]
        assert result.per_class[name].tolist() == pytest.approx(means)
        assert result.foreground_mean[name] == pytest.approx(np.mean(means))
    assert result.per_class[["n", "excluded", "failures"]].to_numpy().tolist() == [[3, 0, 0]] * 2


@pytest.mark.parametrize("dataset_json", [{}, REGIONS], ids=["labels", "regions and ignore label"])
def test_agrees_with_nnunet(tmp_path, dataset_json):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder, load_summary_json
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    reference, prediction = make_folders(tmp_path, **dataset_json)
    # label 2 is in neither map of case a, and only in the reference of case b
    for file, seed in ((reference / "a.nii.gz", 0), (prediction / "a.nii.gz", 0), (prediction / "b.nii.gz", 1)):
        array = label_map(seed, 0.4 * (file.parent == prediction))
        array[array == 2] = 0
        write_labels(file, array)
    if dataset_json:
        array = label_map(2)
        array[3:6, 2:9] = 3
        write_labels(reference / "c.nii.gz", array)
    description = json.loads((prediction / "dataset.json").read_text())
    manager = LabelManager(description["labels"], description.get("regions_class_order"))
    classes = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    theirs = compute_metrics_on_folder(
        str(reference), str(prediction), None, SimpleITKIO(), ".nii.gz", classes, manager.ignore_label, 1
    )
    ours = evaluate((reference, prediction))
    ours.write(tmp_path / "summary.json")
    read_by_nnunet = load_summary_json(str(tmp_path / "summary.json"))
    counts = ["Dice", "IoU", "TP", "FP", "FN", "TN", "n_ref", "n_pred"]
    for name in counts:
        assert ours.foreground_mean[name] == pytest.approx(theirs["foreground_mean"][name], abs=1e-12)
        for key, mean in theirs["mean"].items():
            assert ours.summary["mean"][str(key)][name] == pytest.approx(mean[name], abs=1e-12)
            assert read_by_nnunet["mean"][key][name] == pytest.approx(mean[name], abs=1e-12)
    for own, other in zip(ours.summary["metric_per_case"], theirs["metric_per_case"], strict=True):
        assert own["prediction_file"] == other["prediction_file"]
        for key, values in other["metrics"].items():
            found = [own["metrics"][str(key)][name] for name in counts]
            assert found == pytest.approx([values[name] for name in counts], abs=1e-12, nan_ok=True)


def test_empty_classes_are_counted(tmp_path):
    folders = make_folders(tmp_path, labels=LABELS | {"never": 3})
    for case, where in (("a", folders), ("b", folders[1:]), ("c", ())):
        for folder in where:
            array = label_map("abc".index(case))
            array[array == 2] = 0
            write_labels(folder / f"{case}.nii.gz", array)
    result = evaluate(folders)
    rows = result.per_case[result.per_case["class"] == "right"].set_index("case")
    assert rows["status"].to_dict() == {"a": "excluded", "b": "failure", "c": "scored"}
    diagonal = np.linalg.norm(np.multiply(SHAPE, SPACING[::-1]))
    assert rows.loc["b", ["Dice", "NSD@1mm", "HD95", "ASSD"]].tolist() == pytest.approx([0, 0, diagonal, diagonal])
    right = result.per_class.loc["right"]
    assert (right["n"], right["excluded"], right["failures"]) == (2, 1, 1)
    assert right["Dice"] == pytest.approx(rows.loc["c", "Dice"] / 2)
    assert right["volume_prediction"] == pytest.approx(rows.loc["c", "volume_prediction"] / 3)
    never = result.per_class.loc["never"]
    assert (never["n"], never["excluded"]) == (0, 3)
    assert np.isnan(never["Dice"])
    assert result.foreground_mean["Dice"] == pytest.approx(result.per_class["Dice"][["left", "right"]].mean())
    assert result.foreground_mean["excluded"] == 4
    assert result.notes == ["in no case, and so not part of the foreground mean: never"]


def test_files_and_table(tmp_path):
    result = evaluate(make_folders(tmp_path), nsd_tolerance_mm=2)
    result.write(tmp_path / "out" / "result.json")
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert written["mean"]["2"]["Dice"] == result.per_class.loc["right", "Dice"]
    assert written["mean"]["2"]["n"] == 3
    assert written["labels"] == {"1": "left", "2": "right"}
    assert written["nsd_tolerance_mm"] == [2.0]
    assert written["metric_per_case"][1]["status"] == {"1": "scored", "2": "scored"}
    assert {"units", "conventions", "nnssl_version"} <= set(written)
    table = pd.read_csv(tmp_path / "out" / "result.csv", dtype={"label": str})
    pd.testing.assert_frame_equal(table, result.per_case, check_dtype=False)
    lines = result.table().splitlines()
    assert lines[0].split() == ["class", "n", "excluded", "failures", "Dice", "IoU", "HD95", "ASSD", "NSD@2mm"]
    assert lines[-1].split()[:6] == ["foreground", "mean", "6", "0", "0", f"{result.foreground_mean['Dice']:.4f}"]
    assert len({len(line) for line in lines}) == 1
    with pytest.raises(UserError, match="must end with"):
        result.write(tmp_path / "result.txt")


def test_two_dimensional_images(tmp_path):
    result = evaluate(make_folders(tmp_path, ".png", shape=(30, 40)))
    expected = compare_label_maps(label_map(0, shape=(30, 40)), label_map(0, 0.4, (30, 40)), (1, 1), {"1": (1,)})["1"]
    row = result.per_case.iloc[0]
    for name in ("Dice", "HD95", "ASSD", "volume_reference"):
        assert row[name] == pytest.approx(expected.metrics[name])
    assert result.unit == "pixels"
    assert [result.summary["units"][name] for name in ("Dice", "HD95", "ASSD")] == ["1", "pixels", "pixels"]
    assert result.notes == [
        "no spacing is known, distances, volumes and tolerances of NSD are in pixels: all cases",
    ]


def test_three_dimensional_tif_with_spacing_file(tmp_path):
    reference, prediction = make_folders(tmp_path, ".tif", cases=0)
    for folder, noise in ((reference, 0), (prediction, 0.4)):
        Tiff3DIO().write_seg(label_map(0, noise), str(folder / "a.tif"), {"spacing": [2.0, 1.25, 0.8]})
    result = evaluate((reference, prediction))
    expected = compare_label_maps(label_map(0), label_map(0, 0.4), (2.0, 1.25, 0.8), {"1": (1,)})["1"].metrics
    assert result.per_case.iloc[0]["HD95"] == pytest.approx(expected["HD95"])
    assert (result.unit, result.notes) == ("mm", [])


def test_tif_without_spacing_file(tmp_path):
    folders = make_folders(tmp_path, ".tif", cases=0)
    for folder, noise in zip(folders, (0, 0.4), strict=True):
        for case in "ab":
            Tiff3DIO().write_seg(label_map(0, noise), str(folder / f"{case}.tif"), {"spacing": [1, 1, 1]})
        (folder / "a.json").unlink()
    some = evaluate(folders)
    assert some.unit == "mm"
    assert some.notes == ["no spacing is known, distances, volumes and tolerances of NSD are in voxels: a"]
    assert evaluate(folders, cases=["a"]).unit == "voxels"


def test_sheared_axes_are_told(tmp_path):
    folders = make_folders(tmp_path)
    sheared = np.eye(4)
    sheared[0, 1] = 0.8
    for folder, noise in zip(folders, (0, 0.4), strict=True):
        image = nibabel.Nifti1Image(label_map(1, noise).transpose(), sheared)
        nibabel.save(image, folder / "b.nii.gz")
    result = evaluate(folders, reader_writer=NibabelIO)
    assert result.notes == ["voxel axes are not orthonormal (sheared), so that distances are wrong: b"]
    assert result.summary["notes"] == result.notes


def test_label_values_instead_of_a_description(tmp_path):
    folders = make_folders(tmp_path)
    (folders[1] / "dataset.json").unlink()
    result = evaluate(folders, [2, (1, 2)])
    assert result.per_class.index.tolist() == ["2", "(1, 2)"]
    assert result.notes == []
    only_one = evaluate(folders, [0, 1])
    assert only_one.notes == ["label values in the files that are not evaluated: 2"]
    # as nnU-Net, background is no part of the foreground mean
    assert only_one.foreground_mean["Dice"] == only_one.per_class.loc["1", "Dice"]
    ignoring = evaluate(folders, [1], ignore_label=2)
    assert ignoring.notes == []
    assert ignoring.per_class.loc["1", "FP"] < only_one.per_class.loc["1", "FP"]


def test_description_beside_or_above_the_references(tmp_path):
    reference, prediction = make_folders(tmp_path)
    expected = evaluate((reference, prediction)).per_case
    for place in (tmp_path, reference):
        (prediction / "dataset.json").rename(place / "dataset.json")
        pd.testing.assert_frame_equal(evaluate((reference, prediction)).per_case, expected)
        (place / "dataset.json").rename(prediction / "dataset.json")
    (prediction / "dataset.json").rename(tmp_path / "other.json")
    assert "-djfile" in failure_of((reference, prediction))
    by_path = evaluate((reference, prediction), dataset_json=tmp_path / "other.json")
    pd.testing.assert_frame_equal(by_path.per_case, expected)


def test_the_reader_named_in_the_description_is_used(tmp_path):
    folders = make_folders(tmp_path, overwrite_image_reader_writer="NibabelIO")
    expected = evaluate(folders, reader_writer=NibabelIO)
    pd.testing.assert_frame_equal(evaluate(folders).per_case, expected.per_case)


def test_missing_predictions(tmp_path):
    folders = make_folders(tmp_path)
    (folders[1] / "a.nii.gz").unlink()
    (folders[1] / "c.nii.gz").unlink()
    message = failure_of(folders)
    assert "2 of 3 predictions are missing" in message
    assert "none for a, c" in message
    assert evaluate(folders, cases=["b"]).per_case["case"].unique().tolist() == ["b"]
    assert "1 of 2 predictions are missing" in failure_of(folders, cases=["b", "c"])
    assert "none for d" in failure_of(folders, cases=["b", "d"])
    assert "list of cases is empty" in failure_of(folders, cases=[])


@pytest.mark.parametrize("with_prediction", [True, False])
def test_links_that_lead_nowhere(tmp_path, with_prediction):
    folders = make_folders(tmp_path)
    for folder in folders[: 1 if with_prediction else 2]:
        (folder / "b.nii.gz").unlink()
        (folder / "b.nii.gz").symlink_to("/not/mounted/b.nii.gz")
    message = failure_of(folders)
    assert f"{1 if with_prediction else 2} label files are links to files that do not exist" in message
    assert str(folders[0] / "b.nii.gz") in message
    assert "/not/mounted/b.nii.gz" in message
    assert evaluate(folders, cases=["a", "c"]).per_case["case"].unique().tolist() == ["a", "c"]


def test_endings_in_capitals(tmp_path):
    folders = make_folders(tmp_path)
    for folder in folders:
        for file in sorted(folder.glob("*.nii.gz")):
            file.rename(folder / file.name.replace(".nii.gz", ".NII.GZ"))
    assert len(evaluate(folders, [1]).per_case) == 3
    write_labels(folders[0] / "d.nii.gz", label_map(0))
    assert ".NII.GZ .nii.gz" in failure_of(folders, [1])


def test_extra_predictions_are_told(tmp_path):
    folders = make_folders(tmp_path)
    write_labels(folders[1] / "z.nii.gz", label_map(0))
    (folders[1] / "._a.nii.gz").write_bytes(b"left by a file system")
    assert evaluate(folders).notes == ["predictions without reference label, not evaluated: z"]
    assert evaluate(folders, cases=["a"]).notes == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"shape": (9, 12, 11)}, "shape (9, 12, 11)"),
        ({"spacing": (0.8, 1.25, 2.1)}, "spacing (2.1, 1.25, 0.8)"),
        ({"origin": (0.0, 0.0, 5.0)}, "origin (0.0, 0.0, 5.0)"),
        ({"direction": ROTATED}, "direction"),
    ],
)
def test_different_grids(tmp_path, change, told):
    folders = make_folders(tmp_path)
    file = folders[1] / "b.nii.gz"
    write_labels(file, label_map(1, shape=change.pop("shape", SHAPE)), **change)
    message = failure_of(folders)
    assert "not on the same grid" in message
    assert f"case b, {file}" in message
    assert told in message


def test_rounded_headers_are_accepted(tmp_path):
    folders = make_folders(tmp_path)
    write_labels(folders[1] / "b.nii.gz", label_map(1, 0.4), spacing=(0.800001, 1.25, 2.0), origin=(0, 0, 0.01))
    assert len(evaluate(folders).per_case) == 6


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (label_map(1) * np.uint8(2), "4 ("),
        (label_map(1) * np.float32(0.5), "whole numbers"),
        (label_map(1) * np.float32(1.0000001), "the value 2.0000002"),
        (label_map(1).astype(np.int16) * -1, "values from -2 to 0"),
        (label_map(1).astype(np.int32) * 70000, "values from 0 to 140000"),
        (np.full(SHAPE, np.nan, np.float32), "not a label map"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_files_that_are_no_label_maps(tmp_path, array, told, which):
    folders = make_folders(tmp_path)
    file = folders[which] / "b.nii.gz"
    write_labels(file, array)
    message = failure_of(folders)
    assert f"case b, {file}" in message
    assert told in message


def test_unreadable_files(tmp_path):
    folders = make_folders(tmp_path)
    (folders[1] / "b.nii.gz").write_bytes((folders[1] / "b.nii.gz").read_bytes()[:100])
    assert "case b" in failure_of(folders)
    assert "truncated" in failure_of(folders)
    # the first reference file also serves to find the reader
    (folders[0] / "a.nii.gz").write_bytes(b"")
    assert "case a" in failure_of(folders)


def test_color_images(tmp_path):
    folders = make_folders(tmp_path, ".png", shape=(30, 40))
    write_labels(folders[1] / "b.png", np.zeros((30, 40, 3), np.uint8))
    assert "3 channels" in failure_of(folders)


def test_unusable_arguments(tmp_path):
    folders = make_folders(tmp_path)
    assert "same folder" in failure_of((folders[0], folders[0]))
    assert "not found" in failure_of((folders[0], tmp_path / "none"))
    assert "not found" in failure_of((tmp_path / "none", folders[1]))
    assert "NSD tolerance" in failure_of(folders, nsd_tolerance_mm=-1)
    assert "NSD tolerance" in failure_of(folders, nsd_tolerance_mm=[])
    assert "without label values" in failure_of(folders, ignore_label=3)
    assert "label 1" in failure_of(folders, [1, 1])
    assert "no label" in failure_of(folders, [])
    assert "label value is too high" in failure_of(folders, [70000])
    assert "label value is too high" in failure_of(folders, [1], ignore_label=70000)
    assert "no reference labels" in failure_of(folders, file_ending=".mha")
    assert "no reader" in failure_of(folders, [1], file_ending=".gz")
    assert "reference labels are missing" in failure_of(folders, cases=["q"])
    write_labels(folders[0] / "a.mha", label_map(0))
    assert "format of the label files is not clear" in failure_of(folders, [1])


def test_unusable_descriptions(tmp_path):
    folders = make_folders(tmp_path)
    for labels in (None, {"background": 0}, {"0": "background"}, {"background": 0, "a": 1, "b": 1}):
        assert "label" in failure_of(folders, dataset_json={"labels": labels, "file_ending": ".nii.gz"})
    (folders[1] / "dataset.json").write_text("[]")
    assert "not an object" in failure_of(folders)


def test_labels_of_a_description_are_those_of_nnunet():
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    for labels, order in (
        (LABELS | {"ignore": 3}, None),
        ({"background": 0, "a": [1], "b": 2}, None),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tip": 3, "rim": [1]}, [1, 2, 3, 1]),
    ):
        manager = LabelManager(labels, order)
        expected = manager.foreground_regions if manager.has_regions else manager.foreground_labels
        found = EvaluationLabels.from_dataset_json({"labels": labels, "regions_class_order": order})
        assert list(found.keys.values()) == [str(key) for key in expected]
        assert found.ignore_label == manager.ignore_label


def test_several_processes_give_the_same(tmp_path):
    folders = make_folders(tmp_path)
    expected = evaluate(folders)
    found = evaluate(folders, num_processes=2)
    pd.testing.assert_frame_equal(found.per_case, expected.per_case)
    assert found.summary == expected.summary


class Dying(SimpleITKIO):
    def read_seg(self, seg_fname):
        if "b.nii.gz" in seg_fname:
            os._exit(3)
        return super().read_seg(seg_fname)


def test_a_dying_worker_names_the_case(tmp_path):
    message = failure_of(make_folders(tmp_path), num_processes=2, reader_writer=Dying)
    assert "case b" in message
    assert "exit code 3" in message


def test_an_error_in_a_worker_names_case_and_file(tmp_path):
    folders = make_folders(tmp_path)
    write_labels(folders[1] / "c.nii.gz", label_map(2, shape=(5, 5, 5)))
    assert f"case c, {folders[1] / 'c.nii.gz'}" in failure_of(folders, num_processes=2)


def test_a_flat_nifti_is_two_dimensional(tmp_path):
    reference, prediction = make_folders(tmp_path, cases=0)
    for folder, noise in ((reference, 0), (prediction, 0.4)):
        image = sitk.GetImageFromArray(label_map(0, noise, (30, 40)))
        image.SetSpacing((0.5, 2.0))
        sitk.WriteImage(image, str(folder / "a.nii.gz"))
    row = evaluate((reference, prediction)).per_case.iloc[0]
    maps = label_map(0, shape=(30, 40)), label_map(0, 0.4, (30, 40))
    expected = compare_label_maps(*maps, (2.0, 0.5), {"1": (1,)})["1"].metrics
    assert row["ASSD"] == pytest.approx(expected["ASSD"])
    assert row["volume_reference"] == pytest.approx((maps[0] == 1).sum() * 1.0)


def test_scores_survive_json():
    score = ClassScore("failure", {"Dice": 0.0, "HD95": float("inf"), "ASSD": 2.5, "TP": 0.0})
    result = CaseResult({"liver": score}, frozenset({7, 9}), "pixels", orthonormal=False)
    assert CaseResult.of_plain(json.loads(json.dumps(result.plain()))) == result
