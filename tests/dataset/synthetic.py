"""Tiny data sets for the tests of the raw layer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

SHAPE = (6, 8, 7)


def voxels(seed: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(100, 20, shape).astype(np.float32)


def mask(values: tuple[int, ...] = (1, 2), shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    label = np.zeros(shape, np.uint8)
    for index, value in enumerate(values):
        label[..., 1 + index, 1:4] = value
    return label


def write_volume(path: Path, array: np.ndarray, **geometry: Any) -> None:
    """``geometry``: spacing, origin, direction in SimpleITK's order."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(geometry.get("spacing", (1.0, 1.5, 2.0)[: image.GetDimension()]))
    for name in ("origin", "direction"):
        if name in geometry:
            getattr(image, f"Set{name.title()}")(geometry[name])
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))


def write_dataset_json(folder: Path, **changes: Any) -> dict[str, Any]:
    """``changes`` replace entries; None removes one."""
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    } | changes
    description = {key: value for key, value in description.items() if value is not None}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(description))
    return description


def make_raw(folder: Path, labeled: int = 3, unlabeled: int = 2, test: int = 1, channels: int = 1) -> Path:
    """A sound data set with cases ``lab_0``, ..., ``unl_0``, ..., ``tst_0``, ..."""
    names = {str(index): f"channel{index}" for index in range(channels)}
    write_dataset_json(folder, numTraining=labeled, channel_names=names)
    seed = 0
    for part, prefix, count in (
        ("imagesTr", "lab", labeled),
        ("imagesUn", "unl", unlabeled),
        ("imagesTs", "tst", test),
    ):
        for index in range(count):
            for channel in range(channels):
                seed += 1
                write_volume(folder / part / f"{prefix}_{index}_{channel:04d}.nii.gz", voxels(seed))
            if part == "imagesTr":
                write_volume(folder / "labelsTr" / f"{prefix}_{index}.nii.gz", mask())
    return folder


def make_source(folder: Path, cases: Sequence[str], test: Sequence[str] = (), suffix: str = "") -> Path:
    """A fully labeled folder with ``images/``, ``labels/`` and, if there are test cases, ``split.json``."""
    for index, case in enumerate([*cases, *test]):
        write_volume(folder / "images" / f"{case}{suffix}.nii.gz", voxels(index))
        write_volume(folder / "labels" / f"{case}.nii.gz", mask())
    if test:
        (folder / "split.json").write_text(json.dumps({"train": list(cases), "test": list(test)}))
    return folder
