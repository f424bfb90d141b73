"""A data set in all its stages, small enough to be copied for every mistake that is made with it."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnssl.cli import run
from nnssl.utils.files import write_json
from tests.preprocessing.raw_data import NAME, write_dataset

PLANS = "nnSSLCPUPlans"
MODEL = f"Supervised__{PLANS}__3d_fullres"
VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")

PLAN = "plan_and_preprocess -d 801 -pl nnSSLPlannerCPU -c 3d_fullres -np 1 -npfp 1 --no_pbar"
BUDGET = "-device cpu --epochs 1 --iterations-per-epoch 1 --disable_memory_check --seed 0"
TRAIN = f"train 801 Supervised 0 -p {PLANS} {BUDGET}"
TRAIN_NEXT = f"train 801 MeanTeacher 1 -p {PLANS} {BUDGET}"
PREDICT = "predict -i {root}/scans -o {root}/masks -d 801 -device cpu"


@dataclass
class Place:
    """nnU-Net's three folders below ``root``, scans to segment and reference labels."""

    root: Path
    monkeypatch: pytest.MonkeyPatch

    def __post_init__(self) -> None:
        for variable in VARIABLES:
            self.monkeypatch.setenv(variable, str(self.root / variable))
        # batches are made in this process: workers cost more to start than these patches
        self.monkeypatch.setenv("nnUNet_n_proc_DA", "0")

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw" / NAME

    @property
    def base(self) -> Path:
        """Folder of the preprocessed data set."""
        return self.root / "nnUNet_preprocessed" / NAME

    @property
    def cases(self) -> Path:
        return self.base / f"{PLANS}_3d_fullres"

    @property
    def model(self) -> Path:
        return self.root / "nnUNet_results" / NAME / MODEL

    @property
    def checkpoint(self) -> Path:
        return self.model / "fold_0" / "checkpoint_final.pth"

    def image(self, case: str = "l0", channel: int = 0) -> Path:
        folder = {"l": "imagesTr", "u": "imagesUn", "t": "imagesTs"}[case[0]]
        return self.raw / folder / f"{case}_{channel:04d}.nii.gz"

    def label(self, case: str = "l0") -> Path:
        return self.raw / "labelsTr" / f"{case}.nii.gz"

    def edit(self, file: Path, **entries: Any) -> None:
        """Replaces entries of a JSON object; None removes one."""
        content = json.loads(file.read_text()) | entries
        file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def voxels(self, file: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Writes an image again with other voxels and the same geometry, as far as it has one."""
        image = sitk.ReadImage(str(file))
        changed = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)))
        if changed.GetSize() == image.GetSize():
            changed.CopyInformation(image)
        sitk.WriteImage(changed, str(file))

    def geometry(self, file: Path, change: Callable[[sitk.Image], None]) -> None:
        image = sitk.ReadImage(str(file))
        change(image)
        sitk.WriteImage(image, str(file))

    def run(self, command: str) -> int:
        """Exit code of ``command`` (without ``nnssl_``) in this process."""
        name, *flags = shlex.split(command.format(root=self.root))
        try:
            return run(name, flags)
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1

    def contents(self) -> dict[str, str]:
        """Hash of every file by its path; links are not followed."""
        return {
            str(path.relative_to(self.root)): hashlib.md5(path.read_bytes()).hexdigest()
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }


def make_place(root: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A data set that was planned, preprocessed and trained (fold 0) by the commands."""
    for variable in VARIABLES:
        (root / variable).mkdir(parents=True)
    place = Place(root, monkeypatch)
    write_dataset(root / "nnUNet_raw", labeled=3, unlabeled=2, channels=("T1", "T2"))
    (place.raw / "imagesTs").mkdir()
    (root / "scans").mkdir()
    for channel in (0, 1):
        shutil.copy(place.image("u0", channel), root / "scans" / f"s_{channel:04d}.nii.gz")
        place.voxels(root / "scans" / f"s_{channel:04d}.nii.gz", lambda voxels: voxels + 1)
        shutil.copy(root / "scans" / f"s_{channel:04d}.nii.gz", place.image("t0", channel))
    assert place.run(PLAN) == 0
    plans = json.loads((place.base / f"{PLANS}.json").read_text())
    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            arguments = configuration["architecture"]["arch_kwargs"]
            arguments["features_per_stage"] = [4] * arguments["n_stages"]
    write_json(plans, place.base / f"{PLANS}.json")
    assert place.run(TRAIN) == 0
    return place
