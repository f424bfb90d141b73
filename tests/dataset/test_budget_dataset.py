from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from skimage import io

from nnssl.dataset import budget_dataset
from nnssl.dataset.budget import plan_budget
from nnssl.dataset.budget_dataset import make_budget_dataset
from nnssl.dataset.integrity import check_dataset
from nnssl.dataset.raw import RawDataset
from nnssl.dataset.source import open_source
from nnssl.dataset.splits import ensure_splits, load_fold
from nnssl.errors import UserError

from .synthetic import make_raw, make_source, voxels, write_volume
from .test_source import make_png_source

POOL, TEST = ["a1", "a2", "b1", "b2", "c1", "d1"], ["t1", "t2"]
GROUPS = {"a1": "a", "a2": "a", "b1": "b", "b2": "b", "t1": "t", "t2": "t"}


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    for part in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    make_source(tmp_path / "source", POOL, TEST)
    return tmp_path


def make(folders, *, draw=None, source=None, groups=None, **options):
    opened = source or open_source(folders / "source", channel_names=["MRI"], num_processes=1)
    budget = plan_budget(opened, groups=groups, **(draw or {"labeled": 2}))
    options = {"dataset_id": 5, "name": "Few", "groups": groups, **options}
    return budget, make_budget_dataset(opened, budget, **options)


def all_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_the_data_set_holds_no_hidden_label(folders):
    budget, made = make(folders, draw={"labeled": 2, "seed": 3}, seed=3)
    assert made.folder == folders / "raw" / "Dataset005_Few"
    expected = ["dataset.json"]
    expected += [f"imagesTr/{case}_0000.nii.gz" for case in budget.labeled]
    expected += [f"imagesUn/{case}_0000.nii.gz" for case in budget.unlabeled]
    expected += [f"imagesTs/{case}_0000.nii.gz" for case in TEST]
    expected += [f"labelsTr/{case}.nii.gz" for case in budget.labeled]
    assert all_files(made.folder) == sorted(expected)
    for file in expected[1:]:
        link = made.folder / file
        assert link.is_symlink()
        assert os.path.isabs(os.readlink(link))
        part = "labels" if file.startswith("labels") else "images"
        case = link.name.split("_")[0].split(".")[0]
        assert link.resolve() == folders / "source" / part / f"{case}.nii.gz"
    assert "stay at the source" in made.remarks[0]
    assert check_dataset(RawDataset.open(made.folder), num_processes=1) == []


def test_provenance(folders):
    budget, made = make(folders, draw={"labeled": 2, "seed": 3, "validation": 1}, seed=3)
    description = json.loads((made.folder / "dataset.json").read_text())
    assert description["numTraining"] == 3
    provenance = description["provenance"]
    assert provenance["made_by"] == "nnssl_split"
    assert (provenance["source"], provenance["seed"]) == (str(folders / "source"), 3)
    for part in ("labeled", "validation", "unlabeled", "test"):
        assert provenance[part] == getattr(budget, part)


def test_validation_makes_one_fold(folders):
    budget, made = make(folders, draw={"labeled": 2, "validation": 2})
    assert json.loads((made.folder / "splits_final.json").read_text()) == [
        {"train": budget.labeled, "val": budget.validation}
    ]
    raw = RawDataset.open(made.folder)
    assert sorted(raw.labeled) == sorted([*budget.labeled, *budget.validation])
    preprocessed = folders / "preprocessed" / raw.name
    ensure_splits(raw, preprocessed)
    fold = load_fold(preprocessed / "splits_final.json", 0, raw.labeled, raw.unlabeled)
    assert (fold.train, fold.val, fold.unlabeled) == (budget.labeled, budget.validation, budget.unlabeled)


def test_groups_are_handed_on(folders):
    _, made = make(folders, groups=GROUPS, draw={"labeled": 3})
    assert json.loads((made.folder / "groups.json").read_text()) == GROUPS


def test_unlabeled_scans_of_a_validation_patient_are_not_used(folders):
    write_volume(folders / "source" / "images_unlabeled" / "u1.nii.gz", voxels(30))
    write_volume(folders / "source" / "images_unlabeled" / "u2.nii.gz", voxels(31))
    opened = open_source(folders / "source", channel_names=["MRI"], num_processes=1)
    first = plan_budget(opened, labeled=2, validation=1)
    groups = {"u1": "p", first.validation[0]: "p"}
    budget, made = make(folders, source=opened, groups=groups, draw={"labeled": 2, "validation": 1})
    assert budget.validation == first.validation
    (fold,) = json.loads((made.folder / "splits_final.json").read_text())
    assert fold["unlabeled"] == [case for case in budget.unlabeled if case != "u1"]


def test_hidden_labels_in_a_folder_of_the_user(folders):
    budget, made = make(folders, hidden_labels=folders / "hidden")
    assert all_files(folders / "hidden") == sorted(
        ["hidden_labels.json"]
        + [f"unlabeled/{case}.nii.gz" for case in budget.unlabeled]
        + [f"test/{case}.nii.gz" for case in TEST]
    )
    link = folders / "hidden" / "test" / "t1.nii.gz"
    assert link.resolve() == folders / "source" / "labels" / "t1.nii.gz"
    assert str(folders / "hidden") in made.remarks[0]
    _, made = make(folders, draw={"labeled": 4}, hidden_labels=folders / "hidden", overwrite=True)
    assert len(list((folders / "hidden" / "unlabeled").iterdir())) == 2


def _own_files(folder: Path) -> dict[str, Path]:
    """Files that a user put among the hidden labels."""
    files = {name: folder / name for name in ("test/notes.txt", "test/myeval/dice.csv", "unlabeled/corrected.txt")}
    for file in files.values():
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    return files


def test_hidden_labels_of_another_data_set_are_kept(folders):
    make(folders, hidden_labels=folders / "hidden")
    _own_files(folders / "hidden")
    before = all_files(folders / "hidden")
    with pytest.raises(UserError, match="of another data set") as refused:
        make(folders, dataset_id=6, name="Other", hidden_labels=folders / "hidden", overwrite=True)
    assert "Dataset005_Few" in str(refused.value)
    assert all_files(folders / "hidden") == before
    assert not (folders / "raw" / "Dataset006_Other").exists()


def test_own_files_among_hidden_labels_are_kept(folders):
    make(folders, hidden_labels=folders / "hidden")
    own = _own_files(folders / "hidden")
    budget, _ = make(folders, draw={"labeled": 4}, hidden_labels=folders / "hidden", overwrite=True)
    assert all(file.read_text() == "mine" for file in own.values())
    assert all_files(folders / "hidden") == sorted(
        ["hidden_labels.json", *own]
        + [f"unlabeled/{case}.nii.gz" for case in budget.unlabeled]
        + [f"test/{case}.nii.gz" for case in TEST]
    )


def test_own_files_in_the_place_of_hidden_labels_are_named(folders):
    budget, _ = make(folders, draw={"labeled": 2}, hidden_labels=folders / "hidden")
    mine = folders / "hidden" / "unlabeled" / f"{budget.labeled[0]}.nii.gz"
    mine.write_text("mine")
    before = all_files(folders)
    with pytest.raises(UserError, match="did not write") as refused:
        make(folders, draw={"labeled_cases": budget.unlabeled[:2]}, hidden_labels=folders / "hidden", overwrite=True)
    assert f"unlabeled/{mine.name}" in str(refused.value)
    assert all_files(folders) == before


def test_hidden_labels_stay_out_of_the_folders_of_nnunet(folders):
    (folders / "link").symlink_to(folders / "raw")
    for place in ("raw/Dataset005_Few/labelsTs", "raw/x", "preprocessed/x", "results", "link/x"):
        with pytest.raises(UserError, match="must not lie in"):
            make(folders, hidden_labels=folders / place)
    assert not (folders / "raw").exists()
    (folders / "full").mkdir()
    (folders / "full" / "thesis.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        make(folders, hidden_labels=folders / "full", overwrite=True)


def test_copies_are_independent_of_the_source(folders):
    _, made = make(folders, copy=True, hidden_labels=folders / "hidden")
    files = [*made.folder.rglob("*.nii.gz"), *(folders / "hidden").rglob("*.nii.gz")]
    assert len(files) == 8 + 2 + 4 + 2
    assert not any(file.is_symlink() for file in files)


def test_links_to_links_point_to_the_file_itself(folders):
    make(folders)
    again = open_source(folders / "raw" / "Dataset005_Few")
    _, made = make(folders, source=again, draw={"labeled": 1}, dataset_id=6, name="Fewer")
    assert {link.resolve().parent.parent for link in made.folder.glob("images*/*")} == {folders / "source"}
    assert all(os.readlink(link) == str(link.resolve()) for link in made.folder.glob("images*/*"))


def test_budget_of_a_raw_data_set(folders):
    make_raw(folders / "raw" / "Dataset001_X", channels=2)
    source = open_source("1")
    budget, made = make(folders, source=source, draw={"labeled": 1, "test": 1})
    assert (len(budget.labeled), len(budget.test), len(budget.unlabeled)) == (1, 1, 3)
    assert {"unl_0", "unl_1"} < set(budget.unlabeled)
    raw = RawDataset.open(made.folder)
    assert all(len(images) == 2 for images in raw.unlabeled.values())
    assert raw.dataset_json["labels"] == source.dataset_json["labels"]
    assert check_dataset(raw, num_processes=1) == []


def test_masks_of_255_are_written_anew(folders):
    source = open_source(make_png_source(folders / "png", values=(0, 255)), num_processes=1)
    budget, made = make(folders, source=source, draw={"labeled": 1}, hidden_labels=folders / "hidden")
    (case,), (hidden,) = budget.labeled, budget.unlabeled
    for file in (made.folder / "labelsTr" / f"{case}.png", folders / "hidden" / "unlabeled" / f"{hidden}.png"):
        assert not file.is_symlink()
        original = io.imread(folders / "png" / "labels" / file.name)
        np.testing.assert_array_equal(io.imread(file), original // 255)
    assert (made.folder / "imagesTr" / f"{case}_0000.png").is_symlink()
    assert check_dataset(RawDataset.open(made.folder), num_processes=1) == []


@pytest.mark.parametrize("labels_have_one", [True, False])
def test_spacing_files_of_masks_that_are_written_anew(folders, labels_have_one):
    for part in ("images", "labels"):
        (folders / "tiff" / part).mkdir(parents=True)
    for index, case in enumerate("ab"):
        tifffile.imwrite(folders / "tiff" / "images" / f"{case}_0000.tif", voxels(index))
        tifffile.imwrite(folders / "tiff" / "labels" / f"{case}.tif", 255 * (voxels(index) > 100).astype(np.uint8))
        for part in ("images", "labels") if labels_have_one else ("images",):
            (folders / "tiff" / part / f"{case}.json").write_text(json.dumps({"spacing": [3, 1, 1]}))
    source = open_source(folders / "tiff", channel_names=["EM"], num_processes=1)
    budget, made = make(folders, source=source, draw={"labeled": 1}, hidden_labels=folders / "hidden")
    (case,), (other,) = budget.labeled, budget.unlabeled
    assert all_files(made.folder / "labelsTr") == [f"{case}.json", f"{case}.tif"]
    assert all_files(folders / "hidden") == ["hidden_labels.json", f"unlabeled/{other}.json", f"unlabeled/{other}.tif"]
    reader = RawDataset.open(made.folder).reader_writer_class()()
    for file in (made.folder / "labelsTr" / f"{case}.tif", folders / "hidden" / "unlabeled" / f"{other}.tif"):
        mask, properties = reader.read_seg(str(file))
        assert properties["spacing"] == [3, 1, 1]
        assert set(np.unique(mask)) == {0, 1}
    assert check_dataset(RawDataset.open(made.folder), num_processes=1) == []


@pytest.mark.parametrize("suffix", ["", "_0000"])
def test_spacing_files_of_tiff_images_come_along(folders, suffix):
    for part in ("images", "labels"):
        (folders / "tiff" / part).mkdir(parents=True)
    for index, case in enumerate("ab"):
        tifffile.imwrite(folders / "tiff" / "images" / f"{case}{suffix}.tif", voxels(index))
        label = np.zeros((6, 8, 7), np.uint8)
        label[2:4] = 1
        tifffile.imwrite(folders / "tiff" / "labels" / f"{case}.tif", label)
        for part in ("images", "labels"):
            (folders / "tiff" / part / f"{case}.json").write_text(json.dumps({"spacing": [3, 1, 1]}))
    source = open_source(folders / "tiff", channel_names=["EM"], num_processes=1)
    _, made = make(folders, source=source, draw={"labeled": 1})
    raw = RawDataset.open(made.folder)
    reader = raw.reader_writer_class()()
    for images in [files.images for files in raw.labeled.values()] + list(raw.unlabeled.values()):
        assert reader.read_images(images)[1]["spacing"] == [3, 1, 1]
    assert check_dataset(raw, num_processes=1) == []


def test_existing_data_sets_are_kept(folders):
    make(folders)
    with pytest.raises(UserError, match="--overwrite"):
        make(folders)
    with pytest.raises(UserError, match=r"(?s)id 5 is taken.*Dataset005_Few"):
        make(folders, name="Other", overwrite=True)
    make_raw(folders / "raw" / "Dataset008_Own")
    before = all_files(folders / "raw" / "Dataset008_Own")
    with pytest.raises(UserError, match="not made by nnssl_split"):
        make(folders, dataset_id=8, name="Own", overwrite=True)
    assert all_files(folders / "raw" / "Dataset008_Own") == before


def refused_as_own_source(folders, **options):
    before = {file: (folders / file).exists() for file in all_files(folders)}
    with pytest.raises(UserError, match="cannot be made from itself"):
        make(folders, overwrite=True, **options)
    assert {file: (folders / file).exists() for file in all_files(folders)} == before


@pytest.mark.parametrize("copy", [True, False])
def test_a_data_set_is_not_made_from_itself(folders, copy):
    make(folders, copy=True)
    refused_as_own_source(folders, source=open_source("5"), draw={"labeled": 1}, copy=copy)


def test_nor_from_links_to_it(folders):
    make(folders, copy=True)
    make(folders, source=open_source("5"), draw={"labeled": 1}, dataset_id=6, name="Fewer")
    refused_as_own_source(folders, source=open_source("6"), draw={"labeled": 1})


def test_nor_from_links_to_its_links(folders):
    _, made = make(folders)
    (folders / "mine").mkdir()
    for part in ("images", "labels"):
        (folders / "mine" / part).mkdir()
        for file in (made.folder / f"{part}Tr").iterdir():
            (folders / "mine" / part / file.name).symlink_to(file)
    source = open_source(folders / "mine", channel_names=["MRI"], num_processes=1)
    refused_as_own_source(folders, source=source, draw={"labeled": 1})
    make(folders, source=source, draw={"labeled": 1}, dataset_id=6, name="Other", overwrite=True)


def test_nor_from_labels_that_were_written_anew(folders):
    source = open_source(make_png_source(folders / "png", values=(0, 255)), num_processes=1)
    _, made = make(folders, source=source, draw={"labeled": 2})
    (folders / "mine").mkdir()
    (folders / "mine" / "images").symlink_to(folders / "png" / "images")
    (folders / "mine" / "labels").symlink_to(made.folder / "labelsTr")
    refused_as_own_source(folders, source=open_source(folders / "mine", num_processes=1), draw={"labeled": 1})


def test_hidden_labels_are_not_replaced_by_themselves(folders):
    budget, _ = make(folders, copy=True, hidden_labels=folders / "hidden")
    for case in budget.unlabeled:
        write_volume(folders / "mine" / "images" / f"{case}.nii.gz", voxels(0))
    (folders / "mine" / "labels").symlink_to(folders / "hidden" / "unlabeled")
    source = open_source(folders / "mine", channel_names=["MRI"], num_processes=1)
    new = {"source": source, "draw": {"labeled": 1}}
    refused_as_own_source(folders, hidden_labels=folders / "hidden", **new)
    make(folders, hidden_labels=folders / "others", dataset_id=6, name="Second", **new)


def test_overwriting_tells_what_is_stale(folders):
    make(folders)
    (folders / "preprocessed" / "Dataset005_Few").mkdir(parents=True)
    budget, made = make(folders, draw={"labeled": 3}, overwrite=True)
    assert len(list((made.folder / "labelsTr").iterdir())) == len(budget.labeled) == 3
    assert any("preprocessed/Dataset005_Few" in remark for remark in made.remarks)
    assert len(list((folders / "source" / "images").iterdir())) == 8


@pytest.mark.parametrize(("dataset_id", "name"), [(0, "X"), (1000, "X"), (5, "a/b"), (5, ""), (5, "Dataset005_X")])
def test_invalid_names(folders, dataset_id, name):
    with pytest.raises(UserError, match="data set"):
        make(folders, dataset_id=dataset_id, name=name)


def test_a_failure_leaves_nothing_behind(folders, monkeypatch):
    make(folders)
    before = all_files(folders / "raw")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(budget_dataset, "_write_descriptions", fail)
    with pytest.raises(OSError, match="disk full"):
        make(folders, overwrite=True)
    assert all_files(folders / "raw") == before
    assert [path.name for path in (folders / "raw").iterdir()] == ["Dataset005_Few"]


def test_where_links_cannot_be_made_copying_is_recommended(folders, monkeypatch):
    def refuse(*_):
        raise OSError("privilege not held")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with pytest.raises(UserError, match="--copy"):
        make(folders)
