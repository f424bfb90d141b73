from __future__ import annotations

import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, infer_dataset_class, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.planners.planning import make_plans
from nnssl.planners.semi_supervised import nnSSLPlannerCPU
from nnssl.preprocessing import configuration as module
from nnssl.preprocessing.case import CasePreprocessor
from nnssl.preprocessing.configuration import (
    Outcome,
    copy_reference_labels,
    preprocess_configuration,
    require_preprocessed,
)
from nnssl.preprocessing.content import content_keys
from nnssl.preprocessing.fingerprint import make_fingerprint
from nnssl.utils.paths import preprocessed_folder
from tests.preprocessing.raw_data import NAME, write_dataset, write_image, write_label

IDENTIFIER = "nnSSLCPUPlans_3d_fullres"


def keys_of(raw: RawDataset):
    return content_keys(raw, preprocessed_folder() / NAME / "manifests" / "content.json", num_threads=1)


def plan(folder: Path, **options: Any) -> dict:
    raw = RawDataset.open(folder)
    make_fingerprint(raw, keys_of(raw), num_processes=1)
    return make_plans(nnSSLPlannerCPU, NAME, **options)


def preprocess(folder: Path, plans: dict, configuration: str = "3d_fullres", **options: Any) -> Outcome:
    raw = RawDataset.open(folder)
    return preprocess_configuration(raw, plans, configuration, keys_of(raw), **{"num_processes": 1, **options})


def plan_and_preprocess(folder: Path) -> Outcome:
    return preprocess(folder, plan(folder))


def products(kind: str = "") -> Path:
    return preprocessed_folder() / NAME / f"{IDENTIFIER}{kind}"


def states(kind: str = "") -> dict[str, tuple[int, int]]:
    files = [file for file in products(kind).iterdir() if file.suffix != ".json"]
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def touched(before: dict, after: dict) -> set[str]:
    return {name for name in set(before) | set(after) if before.get(name) != after.get(name)}


def files_of(case: str, kind: str = "seg") -> set[str]:
    return {f"{case}.b2nd", f"{case}_{kind}.b2nd", f"{case}.pkl"}


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Names of the cases that were preprocessed, in all runs of a test."""
    names: list[str] = []
    run = module.map_cases

    def recorded(function, jobs, **options):
        names.extend(jobs)
        return run(function, jobs, **options)

    monkeypatch.setattr(module, "map_cases", recorded)
    return names


def run_stock_preprocessor(raw: RawDataset, plans: dict, *, whole: bool) -> None:
    """Replaces the labeled products by nnU-Net's; ``whole``: by the run that its command does, which starts workers."""
    preprocessor = DefaultPreprocessor(verbose=False)
    preprocessor.show_progress_bar = False
    if whole:
        preprocessor.run(NAME, "3d_fullres", plans["plans_name"], num_processes=1)
        return
    shutil.rmtree(products())
    products().mkdir()
    manager = PlansManager(plans)
    for case, files in raw.labeled.items():
        target = str(products() / case)
        configuration = manager.get_configuration("3d_fullres")
        preprocessor.run_case_save(target, files.images, files.label, manager, configuration, raw.dataset_json)


DATASETS: dict[str, dict[str, Any]] = {
    "zscore": {},
    "two_channels": {"channels": ("CT", "T1")},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "dim": 2}, "regions_class_order": [1, 2]},
    "ignore": {"labels": {"background": 0, "bright": 1, "ignore": 2}},
}


@pytest.mark.parametrize("dataset", DATASETS)
def test_labeled_cases_equal_those_of_nnunet(raw_root, dataset):
    folder = write_dataset(raw_root, unlabeled=1, **DATASETS[dataset])
    plans = plan(folder, overwrite_target_spacing=[1.2, 1.0, 1.1])
    preprocess(folder, plans)
    ours = shutil.copytree(products(), products("_ours"))
    run_stock_preprocessor(RawDataset.open(folder), plans, whole=dataset == "zscore")
    assert {f.name for f in ours.iterdir()} == {f.name for f in products().iterdir()} == files_of("l0") | files_of("l1")
    for case in ("l0", "l1"):
        for name in (f"{case}.b2nd", f"{case}_seg.b2nd"):
            mine, stock = (blosc2.open(str(path / name), mode="r") for path in (ours, products()))
            assert (mine.dtype, mine.chunks, mine.blocks) == (stock.dtype, stock.chunks, stock.blocks)
            np.testing.assert_array_equal(mine[:], stock[:])
        mine, stock = (pickle.loads((path / f"{case}.pkl").read_bytes()) for path in (ours, products()))
        mine_locations, stock_locations = mine.pop("class_locations"), stock.pop("class_locations")
        assert mine == stock
        assert mine_locations.keys() == stock_locations.keys()
        for label, locations in mine_locations.items():
            np.testing.assert_array_equal(locations, stock_locations[label])


@pytest.mark.parametrize("dataset", DATASETS)
def test_unlabeled_cases_equal_nnunet_without_label(raw_root, dataset):
    folder = write_dataset(raw_root, unlabeled=1, **DATASETS[dataset])
    plans = plan(folder, overwrite_target_spacing=[1.2, 1.0, 1.1])
    preprocess(folder, plans)
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    raw = RawDataset.open(folder)
    image, seg, properties = DefaultPreprocessor(verbose=False).run_case(
        raw.unlabeled["u0"], None, manager, configuration, raw.dataset_json
    )
    assert {f.name for f in products("_unlabeled").iterdir()} == files_of("u0", "mask") | {"manifest.json"}
    stored = blosc2.open(str(products("_unlabeled") / "u0.b2nd"), mode="r")
    mask = blosc2.open(str(products("_unlabeled") / "u0_mask.b2nd"), mode="r")
    np.testing.assert_array_equal(stored[:], image)
    np.testing.assert_array_equal(mask[:], seg >= 0)
    assert stored.dtype == np.float32
    assert mask.dtype == np.uint8
    for array in (stored, mask):
        blocks, chunks = comp_blosc2_params(array.shape, configuration.patch_size, array.dtype.itemsize)
        assert (array.blocks, array.chunks) == (blocks, chunks)
    assert pickle.loads((products("_unlabeled") / "u0.pkl").read_bytes()) == properties


def test_mask_is_zero_outside_the_body(raw_root):
    folder = write_dataset(raw_root, unlabeled=1)
    image_file = folder / "imagesUn" / "u0_0000.nii.gz"
    image = sitk.ReadImage(str(image_file))
    array = sitk.GetArrayFromImage(image)
    array[2:8, 2:8, 2:8] = 0  # a corner of the bounding box that is not filled
    corner = sitk.GetImageFromArray(array)
    corner.CopyInformation(image)
    sitk.WriteImage(corner, str(image_file))
    plan_and_preprocess(folder)
    mask = blosc2.open(str(products("_unlabeled") / "u0_mask.b2nd"), mode="r")[:]
    assert mask[0, 0, 0, 0] == 0
    assert mask[0, -1, -1, -1] == 1
    assert mask.mean() == pytest.approx(1 - 6**3 / np.prod(mask.shape))


def test_nnunet_lists_labeled_cases_only(raw_root):
    plan_and_preprocess(write_dataset(raw_root))
    assert sorted(nnUNetDatasetBlosc2.get_identifiers(str(products()))) == ["l0", "l1"]
    assert infer_dataset_class(str(products())) is nnUNetDatasetBlosc2


def test_second_run_does_nothing(raw_root, made):
    folder = write_dataset(raw_root)
    assert plan_and_preprocess(folder) == Outcome("3d_fullres", made=5, unchanged=0, removed=0)
    before = states(), states("_unlabeled")
    assert len(before[0]) == 6
    made.clear()
    assert plan_and_preprocess(folder) == Outcome("3d_fullres", made=0, unchanged=5, removed=0)
    assert (states(), states("_unlabeled")) == before
    assert made == []


def test_clean_makes_all_again(raw_root, made):
    folder = write_dataset(raw_root)
    plans = plan(folder)
    preprocess(folder, plans)
    made.clear()
    assert preprocess(folder, plans, clean=True).made == 5
    assert len(made) == 5


def test_changed_image_and_changed_label_are_made_again(raw_root, made):
    folder = write_dataset(raw_root)
    plan_and_preprocess(folder)
    before = states(), states("_unlabeled")
    made.clear()
    write_image(folder, "u1", seed=50)
    label = folder / "labelsTr" / "l0.nii.gz"
    flipped = sitk.GetImageFromArray(sitk.GetArrayFromImage(sitk.ReadImage(str(label)))[::-1])
    flipped.CopyInformation(sitk.ReadImage(str(label)))
    sitk.WriteImage(flipped, str(label))
    assert plan_and_preprocess(folder) == Outcome("3d_fullres", made=2, unchanged=3, removed=0)
    assert set(made) == {"u1", "l0"}
    assert touched(before[0], states()) == files_of("l0")
    assert touched(before[1], states("_unlabeled")) == files_of("u1", "mask")


def test_removed_case_is_removed(raw_root, made):
    folder = write_dataset(raw_root)
    plans = plan(folder)
    preprocess(folder, plans)
    before = states("_unlabeled")
    made.clear()
    (folder / "imagesUn" / "u2_0000.nii.gz").unlink()
    assert preprocess(folder, plans) == Outcome("3d_fullres", made=0, unchanged=4, removed=1)
    assert made == []
    assert touched(before, states("_unlabeled")) == files_of("u2", "mask")
    assert not any(file.name.startswith("u2") for file in products("_unlabeled").iterdir())


def test_newly_labeled_case_alone_is_made_again(raw_root, made):
    folder = write_dataset(raw_root)
    plan_and_preprocess(folder)
    before = states(), states("_unlabeled")
    made.clear()
    (folder / "imagesUn" / "u0_0000.nii.gz").rename(folder / "imagesTr" / "u0_0000.nii.gz")
    write_label(folder, "u0")
    assert plan_and_preprocess(folder) == Outcome("3d_fullres", made=1, unchanged=4, removed=0)
    assert made == ["u0"]
    assert touched(before[0], states()) == files_of("u0")
    assert touched(before[1], states("_unlabeled")) == files_of("u0", "mask")
    assert sorted(nnUNetDatasetBlosc2.get_identifiers(str(products()))) == ["l0", "l1", "u0"]


def test_other_spacing_makes_all_again(raw_root, made):
    folder = write_dataset(raw_root)
    plan_and_preprocess(folder)
    made.clear()
    assert preprocess(folder, plan(folder, overwrite_target_spacing=[2.0, 2.0, 2.0])).made == 5
    assert len(made) == 5
    assert blosc2.open(str(products() / "l0.b2nd"), mode="r").shape[1:] == (12, 10, 9)


def test_interrupted_run_goes_on_where_it_stopped(raw_root, made, monkeypatch):
    folder = write_dataset(raw_root)
    plans = plan(folder)
    run = DefaultPreprocessor.run_case_npy
    count = iter(range(100))

    def interrupted(self, *args, **kwargs):
        if next(count) == 2:
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(DefaultPreprocessor, "run_case_npy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess(folder, plans)
    before = states() | states("_unlabeled")
    assert set(before) == files_of("l0") | files_of("l1")
    assert not list((preprocessed_folder() / NAME).glob(".tmp*"))
    made.clear()
    assert preprocess(folder, plans) == Outcome("3d_fullres", made=3, unchanged=2, removed=0)
    assert made == ["u0", "u1", "u2"]
    assert touched(before, states()) == set()


def test_traces_of_a_killed_run_are_removed(raw_root):
    folder = write_dataset(raw_root)
    plans = plan(folder)
    preprocess(folder, plans)
    abandoned = preprocessed_folder() / NAME / f".tmp_{IDENTIFIER}_abc" / "x"
    abandoned.mkdir(parents=True)
    (products() / "ghost.b2nd").write_text("a case that nnU-Net would train on")
    assert preprocess(folder, plans).made == 0
    assert not abandoned.parent.exists()
    assert sorted(nnUNetDatasetBlosc2.get_identifiers(str(products()))) == ["l0", "l1"]


def test_failed_case_is_named_and_the_others_are_kept(raw_root):
    folder = write_dataset(raw_root)
    plans = plan(folder)
    (folder / "imagesUn" / "u1_0000.nii.gz").write_text("not an image")
    with pytest.raises(RuntimeError, match="case u1"):
        preprocess(folder, plans)
    assert set(states()) == files_of("l0") | files_of("l1")
    write_image(folder, "u1", seed=1)
    assert preprocess(folder, plans).made == 2


class Dying(CasePreprocessor):
    """Ends its process at case u1, as the kernel does when memory is used up."""

    def __call__(self, case: str, *args: Any) -> None:
        if case == "u1":
            os.kill(os.getpid(), signal.SIGKILL)
        super().__call__(case, *args)


def test_dying_worker_is_told_with_its_case(raw_root, monkeypatch):
    folder = write_dataset(raw_root)
    plans = plan(folder)
    monkeypatch.setattr(module, "CasePreprocessor", Dying)
    with pytest.raises(UserError, match="case u1"):
        preprocess(folder, plans, num_processes=2)


def test_workers_make_the_same_as_one_process(raw_root):
    folder = write_dataset(raw_root)
    plans = plan(folder)
    preprocess(folder, plans)
    alone = {name: blosc2.open(str(products("_unlabeled") / name), mode="r")[:] for name in ("u0.b2nd", "u2_mask.b2nd")}
    assert preprocess(folder, plans, num_processes=2, clean=True).made == 5
    for name, array in alone.items():
        np.testing.assert_array_equal(blosc2.open(str(products("_unlabeled") / name), mode="r")[:], array)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("imagesTr/l0", "imagesTr/l1_seg"),
        ("imagesUn/u0", "imagesUn/u1_mask"),
        ("imagesUn/u0", "imagesUn/u1_seg"),
    ],
)
def test_reserved_names_are_refused(raw_root, old, new):
    folder = write_dataset(raw_root)
    plans = plan(folder)
    (folder / f"{old}_0000.nii.gz").rename(folder / f"{new}_0000.nii.gz")
    if new.startswith("imagesTr"):
        (folder / "labelsTr" / "l0.nii.gz").rename(folder / "labelsTr" / "l1_seg.nii.gz")
    with pytest.raises(UserError, match=Path(new).name):
        preprocess(folder, plans)


def test_training_is_refused_on_cases_of_other_plans(raw_root):
    folder = write_dataset(raw_root)
    dataset_json = RawDataset.open(folder).dataset_json
    plans = plan(folder)
    with pytest.raises(UserError, match="not preprocessed"):
        require_preprocessed(plans, "3d_fullres", dataset_json)
    preprocess(folder, plans)
    require_preprocessed(plans, "3d_fullres", dataset_json)
    replanned = plan(folder, overwrite_target_spacing=[2.0, 2.0, 2.0])
    with pytest.raises(UserError, match="other plans"):
        require_preprocessed(replanned, "3d_fullres", dataset_json)


def test_reference_labels(raw_root):
    folder = write_dataset(raw_root)
    target = preprocessed_folder() / NAME / "gt_segmentations"
    copy_reference_labels(RawDataset.open(folder))
    assert {file.name for file in target.iterdir()} == {"l0.nii.gz", "l1.nii.gz"}
    for file in target.iterdir():
        assert file.read_bytes() == (folder / "labelsTr" / file.name).read_bytes()
    inode = (target / "l0.nii.gz").stat().st_ino
    (folder / "labelsTr" / "l1.nii.gz").write_bytes(b"changed")
    for part in ("imagesTr/l0_0000", "imagesUn/u0_0000"):
        assert (folder / f"{part}.nii.gz").exists()
    copy_reference_labels(RawDataset.open(folder))
    assert (target / "l0.nii.gz").stat().st_ino == inode
    assert (target / "l1.nii.gz").read_bytes() == b"changed"
    (folder / "imagesTr" / "l1_0000.nii.gz").rename(folder / "imagesUn" / "l1_0000.nii.gz")
    copy_reference_labels(RawDataset.open(folder))
    assert {file.name for file in target.iterdir()} == {"l0.nii.gz"}
