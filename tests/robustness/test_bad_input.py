"""Wrong input of every kind, through the commands: one message that tells what, where and how to mend it; exit code 2;
and every file that was there is there as it was.

A row of a table is one mistake: how it is made, the command that meets it, and what the message must name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from tests.preprocessing.raw_data import NAME
from tests.robustness.place import MODEL, PLAN, PLANS, PREDICT, TRAIN, TRAIN_NEXT, Place

Damage = Callable[[Place], Any]
TRAIN_ALL = TRAIN_NEXT.replace("MeanTeacher 1", "MeanTeacher all")
# what can be made again from the raw data, and is, before folds and groups are looked at
DERIVED = {"content.json", "dataset_fingerprint.json"}
Row = tuple[str, Damage, str, tuple[str, ...]]


def nothing(place: Place) -> None:
    """The mistake is in the command."""


def dataset_json(**entries: Any) -> Damage:
    return lambda place: place.edit(place.raw / "dataset.json", **entries)


def plans(**entries: Any) -> Damage:
    return lambda place: place.edit(place.base / f"{PLANS}.json", **entries)


def text(file: Callable[[Place], Path], content: str | bytes) -> Damage:
    data = content.encode() if isinstance(content, str) else content
    return lambda place: file(place).write_bytes(data)


def cut(file: Callable[[Place], Path], share: float) -> Damage:
    def damage(place: Place) -> None:
        data = file(place).read_bytes()
        file(place).write_bytes(data[: int(share * len(data))])

    return damage


def voxels(file: Callable[[Place], Path], change: Callable[[np.ndarray], np.ndarray]) -> Damage:
    return lambda place: place.voxels(file(place), change)


def pixels(change: Callable[[sitk.Image], sitk.Image]) -> Damage:
    def damage(place: Place) -> None:
        file = str(place.image("u0"))
        sitk.WriteImage(change(sitk.ReadImage(file)), file)

    return damage


def one_voxel(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.astype(np.float32)
        array[5, 5, 5] = value
        return array

    return change


def splits(change: Callable[[list[dict[str, list[str]]]], Any]) -> Damage:
    def damage(place: Place) -> None:
        file = place.base / "splits_final.json"
        content = json.loads(file.read_text())
        changed = change(content)
        file.write_text(json.dumps(content if changed is None else changed))

    return damage


def checkpoint(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(place: Place) -> None:
        content = torch.load(place.checkpoint, weights_only=False)
        change(content)
        torch.save(content, place.checkpoint)

    return damage


def configuration(**entries: Any) -> Damage:
    def damage(place: Place) -> None:
        content = json.loads((place.base / f"{PLANS}.json").read_text())
        content["configurations"]["3d_fullres"].update(entries)
        (place.base / f"{PLANS}.json").write_text(json.dumps(content))

    return damage


def image(place: Place) -> Path:
    return place.image()


def label(place: Place) -> Path:
    return place.label()


def scan(place: Place) -> Path:
    return place.root / "scans" / "s_0000.nii.gz"


def raw_json(place: Place) -> Path:
    return place.raw / "dataset.json"


def plans_file(place: Place) -> Path:
    return place.base / f"{PLANS}.json"


def rename(file: Callable[[Place], Path], name: str) -> Damage:
    return lambda place: file(place).rename(file(place).with_name(name))


def nifti_4d(place: Place) -> None:
    import nibabel

    nibabel.save(nibabel.Nifti1Image(np.zeros((8, 8, 8, 3), np.float32), np.eye(4)), place.image())


def use_scan_of(case: str) -> Damage:
    """Test case t0 becomes the same image as ``case``."""

    def damage(place: Place) -> None:
        for channel in (0, 1):
            shutil.copy(place.image(case, channel), place.image("t0", channel))

    return damage


def labeled_and_unlabeled(place: Place) -> None:
    for channel in (0, 1):
        shutil.copy(place.image("l0", channel), place.raw / "imagesUn")


def sheared(place: Place) -> None:
    import nibabel

    for channel in (0, 1):
        stored = nibabel.load(place.image("u0", channel))
        affine = stored.affine @ np.array([[1, 0.02, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        image = nibabel.Nifti1Image(stored.get_fdata().astype(np.float32), affine)
        image.header.set_qform(None, code=0)
        nibabel.save(image, place.image("u0", channel))


def stop_preprocessing(place: Place) -> None:
    """Preprocesses anew and fails at the third of five cases."""
    from nnssl.preprocessing.case import CasePreprocessor

    real, calls = CasePreprocessor.__call__, []

    def failing(self: CasePreprocessor, case: str, *arguments: Any) -> None:
        calls.append(case)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, case, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CasePreprocessor, "__call__", failing)
        assert place.run(PLAN + " --clean") == 130


RAW: list[Row] = [
    ("dataset.json is missing", lambda p: raw_json(p).unlink(), PLAN, ("dataset.json", "not found", "to do")),
    ("dataset.json is no JSON", text(raw_json, "{oops"), PLAN, ("dataset.json", "not valid JSON", "found")),
    ("dataset.json is not text", text(raw_json, b"\xff\xfe\x00"), PLAN, ("dataset.json", "not valid JSON")),
    ("dataset.json is a list", text(raw_json, "[]"), PLAN, ("dataset.json", "not an object")),
    ("no channel names", dataset_json(channel_names=None), PLAN, ("lacks channel_names", "to do")),
    ("no labels", dataset_json(labels=None), PLAN, ("lacks labels", "to do")),
    ("no background", dataset_json(labels={"bright": 1, "dim": 2}), PLAN, ("background", "dataset.json")),
    ("text as label", dataset_json(labels={"background": 0, "bright": "one"}), PLAN, ("'bright'", "'one'")),
    ("gap in the labels", dataset_json(labels={"background": 0, "bright": 1, "dim": 3}), PLAN, ("not consecutive",)),
    ("only background", dataset_json(labels={"background": 0}), PLAN, ("no foreground class",)),
    ("ignore label in between", dataset_json(labels={"background": 0, "ignore": 1, "dim": 2}), PLAN, ("ignore",)),
    ("regions without order", dataset_json(labels={"background": 0, "whole": [1, 2], "dim": 2}), PLAN,
     ("regions_class_order",)),
    ("channel numbers", dataset_json(channel_names={"1": "T1", "2": "T2"}), PLAN, ("channel_names", "channel numbers")),
    ("numTraining is text", dataset_json(numTraining="three"), PLAN, ("numTraining", "'three'")),
    ("unknown ending", dataset_json(file_ending=".xyz"), PLAN, ("file_ending", ".xyz")),
    ("version 1 of nnU-Net", dataset_json(channel_names=None, modality={"0": "T1"}), PLAN, ("nnUNetv2_convert",)),
    ("more channels declared", dataset_json(channel_names={"0": "T1", "1": "T2", "2": "T3"}), PLAN,
     ("imagesTr/l0_0000.nii.gz", "declares 3")),
    ("missing channel", lambda p: p.image("l0", 1).unlink(), PLAN, ("imagesTr/l0_0000.nii.gz", "1 channel", "2")),
    ("gap in the channels", rename(lambda p: p.image("u0", 1), "u0_0002.nii.gz"), PLAN, ("imagesUn/u0", "0002")),
    ("wrong ending", rename(image, "l0_0000.mha"), PLAN, ("imagesTr/l0_0000.mha", "other format", ".nii.gz")),
    ("misnamed image", rename(image, "l0.nii.gz"), PLAN, ("imagesTr/l0.nii.gz", "_XXXX.nii.gz")),
    ("truncated gzip", cut(image, 0.5), PLAN, ("imagesTr/l0_0000.nii.gz", "truncated")),
    ("truncated label", cut(label, 0.7), PLAN, ("labelsTr/l0.nii.gz", "truncated")),
    ("zero-byte file", text(image, b""), PLAN, ("imagesTr/l0_0000.nii.gz", "0 bytes")),
    ("text in place of an image", text(image, b"no image" * 100), PLAN, ("imagesTr/l0_0000.nii.gz", "damaged")),
    ("broken link", lambda p: (image(p).unlink(), image(p).symlink_to(p.root / "gone")), PLAN,
     ("imagesTr/l0_0000.nii.gz", "does not exist")),
    ("folder in place of a file", lambda p: (label(p).unlink(), label(p).mkdir()), PLAN, ("labelsTr/l0.nii.gz",)),
    ("other grid of a channel", voxels(lambda p: p.image("l0", 1), lambda a: a[:-1]), PLAN,
     ("imagesTr/l0_0001.nii.gz", "shape")),
    ("other spacing of the label", lambda p: p.geometry(label(p), lambda i: i.SetSpacing((1, 1, 2.5))), PLAN,
     ("labelsTr/l0.nii.gz", "spacing")),
    ("other origin of a channel", lambda p: p.geometry(p.image("l0", 1), lambda i: i.SetOrigin((9, 0, 0))), PLAN,
     ("imagesTr/l0_0001.nii.gz", "origin")),
    ("4D image", nifti_4d, PLAN, ("imagesTr/l0_0000.nii.gz", "one file per channel")),
    ("sheared axes", sheared, PLAN, ("imagesUn/u0_0000.nii.gz", "orthonormal")),
    ("undeclared label value", voxels(label, one_voxel(7)), PLAN, ("labelsTr/l0.nii.gz", "7", "declares 0, 1, 2")),
    ("mask of 0 and 255", voxels(label, lambda a: (a > 0).astype(np.uint8) * 255), PLAN, ("255", "0 and 1")),
    ("label of fractions", voxels(label, one_voxel(0.5)), PLAN, ("labelsTr/l0.nii.gz", "0.5")),
    ("negative label value", voxels(label, one_voxel(-1)), PLAN, ("labelsTr/l0.nii.gz", "-1")),
    ("all labels empty", lambda p: [p.voxels(p.label(f"l{i}"), np.zeros_like) for i in range(3)], PLAN,
     ("labelsTr", "every label is empty")),
    ("missing label", lambda p: label(p).unlink(), PLAN, ("labelsTr/l0.nii.gz", "no label", "imagesUn")),
    ("label without image", rename(label, "x0.nii.gz"), PLAN, ("labelsTr/x0.nii.gz", "without image")),
    ("labeled and unlabeled", labeled_and_unlabeled, PLAN, ("l0", "labeled and unlabeled", "delete it")),
    ("labeled image is a test image", use_scan_of("l0"), PLAN, ("imagesTr/l0", "imagesTs/t0", "delete one")),
    ("complex voxels", pixels(lambda voxels: sitk.Cast(voxels, sitk.sitkComplexFloat32)), PLAN,
     ("imagesUn/u0_0000.nii.gz", "complex")),
    ("colors in a 3D image", pixels(lambda voxels: sitk.Compose(voxels, voxels, voxels)), PLAN,
     ("imagesUn/u0_0000.nii.gz", "one file per channel")),
    ("no labeled case", lambda p: shutil.rmtree(p.raw / "imagesTr"), PLAN, ("no labeled case", NAME)),
    ("case called like a mask", lambda p: [p.image("u0", c).rename(p.image("u0_mask", c)) for c in (0, 1)], PLAN,
     ("u0_mask", "rename")),
    ("group of an unknown case", text(lambda p: p.raw / "groups.json", '{"x": "a"}'), PLAN, ("groups", "x")),
    ("group straddles a fold", text(lambda p: p.raw / "groups.json", '{"l0": "a", "l1": "a"}'), PLAN,
     ("splits_final.json, fold 0", "patients", "l1")),
    ("raw and preprocessed folds differ", text(lambda p: p.raw / "splits_final.json",
     '[{"train": ["l0"], "val": ["l1"]}]'), PLAN, ("different folds", "delete the one")),
]  # fmt: skip

# mistakes most of the time, and meant sometimes
SUSPICIOUS: list[Row] = [
    ("NaN", voxels(image, one_voxel(np.nan)), PLAN, ("imagesTr/l0_0000.nii.gz", "NaN")),
    ("infinite value", voxels(image, one_voxel(np.inf)), PLAN, ("imagesTr/l0_0000.nii.gz", "infinite")),
    ("constant image", voxels(lambda p: p.image("u0"), np.ones_like), PLAN, ("imagesUn/u0_0000.nii.gz", "constant")),
    ("empty label", voxels(label, np.zeros_like), PLAN, ("labelsTr/l0.nii.gz", "empty")),
    ("unlabeled case is a test case", use_scan_of("u0"), PLAN, ("imagesUn/u0", "training will see the test image")),
    ("unlabeled image twice", lambda p: [shutil.copy(p.image("u0", c), p.image("u7", c)) for c in (0, 1)], PLAN,
     ("imagesUn/u0", "same image as imagesUn/u7")),
]  # fmt: skip
SUSPICIOUS = [(name, damage, command, (*told, "--allow_suspicious")) for name, damage, command, told in SUSPICIOUS]

WARNED: list[tuple[str, Damage, tuple[str, ...]]] = [
    ("wrong numTraining", dataset_json(numTraining=9), ("numTraining is 9", "3")),
    ("name of a test case", lambda p: [p.image("t0", c).rename(p.raw / "imagesTs" / f"u0_{c:04d}.nii.gz")
                                       for c in (0, 1)], ("u0", "imagesTs")),
]  # fmt: skip

SETTINGS: list[Row] = [
    ("unknown data set", nothing, PLAN.replace("801", "802"), ("no data set with id 802", "nnUNet_raw")),
    ("not a data set", nothing, PLAN.replace("801", "Tiny"), ("not a data set", "Tiny", "Dataset004_Name")),
    ("two data sets of one id", lambda p: (p.root / "nnUNet_raw/Dataset801_Other").mkdir(), PLAN,
     ("more than one", "Dataset801_Other")),
    ("unknown planner", nothing, PLAN.replace("nnSSLPlannerCPU", "nnSSLPlanerCPU"), ("nnSSLPlanerCPU",)),
    ("unknown preprocessor", nothing, PLAN + " -preprocessor_name Mine", ("preprocessor Mine",)),
    ("unknown configuration", nothing, PLAN.replace("3d_fullres", "3d_full"), ("3d_full", "3d_fullres")),
    ("no worker", nothing, PLAN.replace("-np 1", "-np 0"), ("-np", "0")),
    ("workers of how many configurations", nothing, PLAN.replace("-np 1", "-np 1 2 3"), ("-np", "1 2 3")),
    ("memory target", nothing, PLAN + " -gpu_memory_target -4", ("memory target", "-4")),
    ("spacing", nothing, PLAN + " -overwrite_target_spacing 1 0 1", ("spacing", "0")),
    ("unknown trainer", nothing, TRAIN.replace("Supervised", "MeanTeecher"), ("'MeanTeecher'", "mean MeanTeacher")),
    ("trainer of nnU-Net", nothing, TRAIN.replace("Supervised", "nnUNetTrainer"), ("nnUNetv2_train",)),
    ("unknown fold", nothing, TRAIN.replace(" 0 ", " 9 "), ("no fold 9", "splits_final.json", "0, 1, 2, all")),
    ("not a fold", nothing, TRAIN.replace(" 0 ", " first "), ("not a fold", "first")),
    ("unknown plans", nothing, TRAIN.replace(PLANS, "myPlans"), ("myPlans.json", "nnssl_plan_and_preprocess")),
    ("configuration not planned", nothing, TRAIN + " -c 3d_lowres", ("3d_lowres", "not planned", f"{PLANS}.json")),
    ("configuration not preprocessed", nothing, TRAIN + " -c 2d", ("2d", "not preprocessed", "to do")),
    ("device", nothing, TRAIN.replace("cpu", "tpu"), ("-device", "tpu")),
    ("no epoch", nothing, TRAIN.replace("--epochs 1", "--epochs 0"), ("num_epochs", "0")),
    ("no step", nothing, TRAIN.replace("epoch 1", "epoch 0"), ("num_iterations_per_epoch", "0")),
    ("no process", nothing, TRAIN + " -num_gpus 0", ("-num_gpus 0",)),
    ("no micro batch", nothing, TRAIN + " --micro-batch 0", ("--micro-batch", "0")),
    ("unknown precision", nothing, TRAIN_NEXT + " --precision fp8", ("fp8", "fp32")),
    ("unknown memory format", nothing, TRAIN_NEXT + " --memory-format rows", ("rows", "channels_last")),
    ("--set unknown name", nothing, TRAIN_NEXT + " --set ema_decai=0.9", ("ema_decai", "did you mean 'ema_decay'")),
    ("--set wrong type", nothing, TRAIN_NEXT + " --set ema_decay=high", ("ema_decay", "float", "'high'")),
    ("--set no assignment", nothing, TRAIN_NEXT + " --set ema_decay", ("not an assignment", "ema_decay")),
    ("--set out of range", nothing, TRAIN_NEXT + " --set least_class_share=2", ("least_class_share", "2")),
    ("--set unusable learning rate", nothing, TRAIN_NEXT + " --set initial_lr=-1", ("initial_lr", "-1")),
    ("--set no labeled patch", nothing, TRAIN_NEXT + " --set labeled_batch_size=0", ("labeled", "0")),
    ("--set no unlabeled patch", nothing, TRAIN_NEXT + " --set unlabeled_batch_size=0", ("unlabeled", "0")),
    ("mirrored axis that is none", nothing, TRAIN_NEXT + " --set mirror_axes=(7,)", ("mirror_axes", "7")),
    ("continue and validate", nothing, TRAIN + " --c --val", ("--c", "--val")),
    ("overwritten by mistake", nothing, TRAIN + " --overwrite --set initial_lr=-1", ("initial_lr", "-1")),
    ("trained before", nothing, TRAIN, ("trained before", "checkpoint_final.pth", "--overwrite")),
    ("validation of nothing", nothing, TRAIN_NEXT + " --val", ("not finished", "fold_1", "--c")),
    ("too few labeled cases", splits(lambda s: s[1].update(train=[])), TRAIN_NEXT, ("fold 1", "empty")),
    ("too few unlabeled cases", splits(lambda s: s[1].update(unlabeled=[])), TRAIN_NEXT,
     ("MeanTeacher", "1 unlabeled", "imagesUn")),
    ("pairs of one case", splits(lambda s: s[1].update(train=["l0"])), TRAIN_NEXT +
     " --atlas-augmentation regional_switch", ("2 labeled cases", "found:    1")),
    ("too few labeled cases for the method", splits(lambda s: s[1].update(train=["l0"])),
     TRAIN_NEXT.replace("MeanTeacher", "EFSMedSeg") + " --atlas-augmentation none",
     ("EFSMedSeg needs at least 2 labeled cases", "found:    1")),
    ("fold with an unknown case", splits(lambda s: s[1].update(train=["l0", "l9"])), TRAIN_NEXT, ("fold 1", "l9")),
    ("fold validates on training", splits(lambda s: s[1].update(val=["l0"])), TRAIN_NEXT, ("fold 1", "l0")),
    ("fold trains on unlabeled", splits(lambda s: s[1].update(train=["u0"])), TRAIN_NEXT, ("fold 1", "u0")),
    ("fold names a hidden case", splits(lambda s: s[1].update(unlabeled=["u0", "t0"])), TRAIN_NEXT, ("fold 1", "t0")),
    ("fold repeats a case", splits(lambda s: s[1].update(train=["l0", "l0"])), TRAIN_NEXT, ("repeats", "l0")),
    ("folds are an object", splits(lambda s: {"train": []}), TRAIN_NEXT, ("splits_final.json", "not a list")),
    ("fold without lists", splits(lambda s: [{}, {"train": "l0", "val": ["l1"]}]), TRAIN_NEXT, ("lacks its lists",)),
    ("folds are no JSON", text(lambda p: p.base / "splits_final.json", "["), TRAIN_NEXT, ("splits_final.json", "JSON")),
]  # fmt: skip

STATE: list[Row] = [
    ("plans are no JSON", text(plans_file, "{"), TRAIN_NEXT, (f"{PLANS}.json", "JSON", "nnssl_plan_and_preprocess")),
    ("plans are no JSON, none named", text(plans_file, "{"), TRAIN_NEXT.replace(f"-p {PLANS}", ""),
     (f"{PLANS}.json", "JSON")),
    ("plans without configurations", plans(configurations=None), TRAIN_NEXT, (f"{PLANS}.json", "configurations")),
    ("plans are a list", text(plans_file, "[]"), TRAIN_NEXT, (f"{PLANS}.json", "not an object")),
    ("plans of another data set", plans(dataset_name="Dataset800_Other"), TRAIN_NEXT,
     (f"{PLANS}.json", "Dataset800_Other", NAME)),
    ("plans name an unknown network", lambda p: architecture(p, "mine.Network"), TRAIN_NEXT, ("mine.Network",)),
    ("configuration lacks its network", configuration(architecture=None), TRAIN_NEXT, (f"{PLANS}.json", "3d_fullres")),
    ("other rules than the cases", configuration(spacing=[3, 3, 3]), TRAIN_NEXT, ("other plans", "spacing", "to do")),
    ("plans changed after the training", configuration(patch_size=[8, 8, 8]), TRAIN + " --val",
     ("checkpoint_final.pth", "patch_size")),
    ("network changed after the training", lambda p: wider(p), TRAIN + " --val", ("checkpoint_final.pth", "network")),
    ("checkpoint of another method", lambda p: p.model.rename(p.model.with_name(MODEL.replace("Supervised",
     "MeanTeacher"))), TRAIN.replace("Supervised", "MeanTeacher") + " --c", ("another trainer", "Supervised")),
    ("checkpoint of another fold", lambda p: (p.model / "fold_0").rename(p.model / "fold_1"),
     TRAIN.replace(" 0 ", " 1 ") + " --val", ("checkpoint_final.pth", "fold")),
    ("truncated checkpoint", cut(lambda p: p.checkpoint, 0.6), TRAIN + " --val", ("checkpoint_final.pth", "cut off")),
    ("empty checkpoint", text(lambda p: p.checkpoint, b""), TRAIN + " --val", ("checkpoint_final.pth",)),
    ("checkpoint without weights", checkpoint(lambda c: c.pop("network_weights")), TRAIN + " --val",
     ("checkpoint_final.pth", "network_weights")),
    ("pretrained weights that are not there", nothing, TRAIN_NEXT + " -pretrained_weights {root}/gone.pth",
     ("not found", "gone.pth")),
    ("pretrained weights of another network", lambda p: wider(p), TRAIN_NEXT +
     " -pretrained_weights {root}/nnUNet_results/" + f"{NAME}/{MODEL}/fold_0/checkpoint_final.pth",
     ("do not fit", "checkpoint_final.pth")),
    ("preprocessed case is damaged", cut(lambda p: p.cases / "l0.b2nd", 0.3), TRAIN_NEXT,
     ("l0", "nnssl_plan_and_preprocess")),
    ("preprocessed case is gone", lambda p: [f.unlink() for f in p.cases.glob("l0*")], TRAIN_NEXT, ("l0",)),
    ("unlabeled case is gone", lambda p: [f.unlink() for f in (p.base / f"{PLANS}_3d_fullres_unlabeled").glob("u0*")],
     TRAIN_NEXT, ("u0", "nnssl_plan_and_preprocess")),
    ("interrupted preprocessing", stop_preprocessing, TRAIN_NEXT, ("3d_fullres", "interrupted", "to do")),
    ("interrupted preprocessing, all", stop_preprocessing, TRAIN_ALL, ("interrupted",)),
    ("reference label of the validation is gone", lambda p: (p.base / "gt_segmentations" / "l0.nii.gz").unlink(),
     TRAIN + " --val", ("l0", "gt_segmentations")),
]  # fmt: skip

PREDICTION: list[Row] = [
    ("no such input", nothing, PREDICT.replace("scans", "scan"), ("scan", "not found")),
    ("empty input", lambda p: [f.unlink() for f in (p.root / "scans").iterdir()], PREDICT, ("scans",)),
    ("scan lacks a channel", lambda p: scan(p).unlink(), PREDICT, ("does not fit", "s", "0000")),
    ("truncated scan", cut(scan, 0.5), PREDICT, ("s_0000.nii.gz", "cut off")),
    ("zero-byte scan", text(scan, b""), PREDICT, ("s_0000.nii.gz",)),
    ("wrong ending of a scan", lambda p: [f.rename(str(f).replace(".nii.gz", ".mha"))
                                          for f in (p.root / "scans").iterdir()], PREDICT, (".mha", ".nii.gz")),
    ("channels of two sizes", voxels(scan, lambda a: a[:-1]), PREDICT, ("does not fit", "s")),
    ("masks over scans", nothing, PREDICT.replace("masks", "scans"), ("input folder", "-o")),
    ("masks over labels", lambda p: (shutil.copy(p.image("u0"), p.root / "nnUNet_raw/l0_0000.nii.gz"), shutil.copy(
        p.image("u0"), p.root / "nnUNet_raw/l0_0001.nii.gz")), PREDICT.replace("{root}/scans", "{root}/nnUNet_raw")
     .replace("{root}/masks", "{root}/nnUNet_raw/" + f"{NAME}/labelsTr"), ("labelsTr", "l0.nii.gz")),
    ("output is a file", text(lambda p: p.root / "masks", b"x"), PREDICT, ("not a folder", "masks")),
    ("no such model", nothing, PREDICT + " -tr MeanTeacher", ("MeanTeacher", MODEL)),
    ("fold without model", nothing, PREDICT + " -f 3", ("fold 3", "-f")),
    ("no such checkpoint", nothing, PREDICT + " -chk best.pth", ("best.pth",)),
    ("step size", nothing, PREDICT + " -step_size 0", ("-step_size", "0")),
    ("part of parts", nothing, PREDICT + " -num_parts 2 -part_id 2", ("-part_id", "2")),
    ("model folder without plans", lambda p: (p.model / "plans.json").unlink(), PREDICT, ("plans.json",)),
    ("plans of the model are no JSON", text(lambda p: p.model / "plans.json", "{"), PREDICT, ("plans.json", "JSON")),
    ("plans of the model are a list", text(lambda p: p.model / "plans.json", "[]"), PREDICT,
     ("plans.json", "not an object")),
    ("dataset.json of the model lacks labels", lambda p: p.edit(p.model / "dataset.json", labels=None), PREDICT,
     ("dataset.json", "labels")),
    ("weights of another network", checkpoint(lambda c: c["network_weights"].popitem()), PREDICT, ("do not fit",)),
    ("damaged checkpoint of the model", cut(lambda p: p.checkpoint, 0.9), PREDICT, ("checkpoint_final.pth",)),
    ("reference folder is gone", nothing, "evaluate -gt {root}/gt -pred {root}/scans", ("gt", "not found")),
    ("prediction is missing", nothing, "evaluate -gt {root}/nnUNet_raw/" + NAME + "/labelsTr -pred {root}/scans -np 1",
     ("missing", "l0")),
    ("run without evaluation", nothing, "compare {root}/scans {root}/nnUNet_raw", ("scans", "no evaluation")),
    ("report of nothing", nothing, "report {root}/gone -o {root}/report.html", ("gone", "not found")),
    ("report of another ending", nothing, "report {root}/scans -o {root}/report.pdf", (".html", "report.pdf")),
    ("export over a file", text(lambda p: p.root / "model", b"x"), "export -d 801 -o {root}/model", ("exists",)),
    ("zip of another name", nothing, "export -d 801 -o {root}/model.tar --zip", (".zip", "model.tar")),
    ("split of nothing", nothing, "split {root}/gone -d 4 -n X --labeled 1", ("gone", "not a source")),
    ("split asks for too many", nothing, "split {root}/nnUNet_raw/" + NAME + " -d 4 -n X --labeled 9", ("too few",)),
    ("split takes an id", nothing, "split {root}/nnUNet_raw/" + NAME + " -d 801 -n X --labeled 1", ("801", "taken")),
]  # fmt: skip


def architecture(place: Place, name: str) -> None:
    content = json.loads(plans_file(place).read_text())
    content["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = name
    plans_file(place).write_text(json.dumps(content))


def wider(place: Place) -> None:
    content = json.loads(plans_file(place).read_text())
    arguments = content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments["features_per_stage"] = [8] * arguments["n_stages"]
    plans_file(place).write_text(json.dumps(content))


def check_refusal(place: Place, capsys: pytest.CaptureFixture[str], command: str, named: tuple[str, ...]) -> None:
    """Runs ``command``: exit code 2, one message with all of ``named``, every file as before."""
    before = place.contents()
    capsys.readouterr()
    code = place.run(command)
    captured = capsys.readouterr()
    message = captured.err[captured.err.find(f"nnssl_{command.split()[0]}: ") :]
    assert code == 2, captured.err
    assert message.startswith(f"nnssl_{command.split()[0]}: ")
    assert captured.err.count(f"nnssl_{command.split()[0]}: ") == 1
    assert "Traceback" not in captured.out + captured.err
    assert not [part for part in named if part not in message], message
    after = place.contents()
    changed = {name for name, content in before.items() if after.get(name) != content}
    assert not {name for name in changed if Path(name).name not in DERIVED}
    assert not [name for name in set(after) - set(before) if name.startswith("nnUNet_raw") or ".tmp_" in name]


TABLE = [pytest.param(*row[1:], id=row[0]) for row in (*RAW, *SUSPICIOUS, *SETTINGS, *STATE, *PREDICTION)]


@pytest.mark.parametrize(("damage", "command", "named"), TABLE)
def test_refused_with_one_message(place, capsys, damage, command, named):
    damage(place)
    check_refusal(place, capsys, command, named)


@pytest.mark.parametrize(("damage", "named"), [pytest.param(*row[1:], id=row[0]) for row in WARNED])
def test_told_as_a_warning(place, capsys, damage, named):
    damage(place)
    raw = {name: content for name, content in place.contents().items() if name.startswith("nnUNet_raw")}
    assert place.run(PLAN + " --no_pp") == 0
    captured = capsys.readouterr()
    assert not [part for part in named if part not in captured.out], captured.out
    after = place.contents()
    assert {name: after[name] for name in raw} == raw
