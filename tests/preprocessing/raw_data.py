"""Tiny raw data sets: a bright box and a dim box in noise, with a margin of zeros that nnU-Net crops away."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from skimage.io import imsave

NAME = "Dataset801_Tiny"
SHAPE = (20, 24, 22)


def set_folders(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Points nnU-Net's variables below ``root``; returns the raw folder."""
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / variable).mkdir(parents=True)
        monkeypatch.setenv(variable, str(root / variable))
    return root / "nnUNet_raw"


def write_dataset(
    raw_root: Path,
    *,
    labeled: int = 2,
    unlabeled: int = 3,
    shape: tuple[int, ...] = SHAPE,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.5),
    channels: tuple[str, ...] = ("T1",),
    ending: str = ".nii.gz",
    **dataset_json: object,
) -> Path:
    """Labeled cases l0, l1, ... and unlabeled ones u0, u1, ...; spacing in SimpleITK's order (x, y, z)."""
    folder = raw_root / NAME
    for part in ("imagesTr", "labelsTr", "imagesUn"):
        (folder / part).mkdir(parents=True)
    content = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": {"background": 0, "bright": 1, "dim": 2},
        "numTraining": labeled,
        "file_ending": ending,
    }
    (folder / "dataset.json").write_text(json.dumps(content | dataset_json))
    names = [f"l{i}" for i in range(labeled)] + [f"u{i}" for i in range(unlabeled)]
    for seed, name in enumerate(names):
        write_image(folder, name, seed, shape=shape, spacing=spacing, channels=len(channels), ending=ending)
        if name.startswith("l"):
            write_label(folder, name, shape=shape, spacing=spacing, ending=ending)
    return folder


def write_image(
    folder: Path,
    name: str,
    seed: int,
    *,
    shape: tuple[int, ...] = SHAPE,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.5),
    channels: int = 1,
    ending: str = ".nii.gz",
) -> None:
    """Image files of a case in imagesTr if its name begins with l, else in imagesUn."""
    target = folder / ("imagesTr" if name.startswith("l") else "imagesUn")
    rng = np.random.default_rng(seed)
    for channel in range(channels):
        image = rng.uniform(20, 60, shape) + 100 * (_label(shape) == 1) + 40 * (_label(shape) == 2) + channel
        inside = np.zeros(shape, dtype=bool)
        inside[tuple(slice(2, size - 2) for size in shape)] = True
        _write(target / f"{name}_{channel:04d}{ending}", image * inside, spacing)


def write_label(
    folder: Path,
    name: str,
    *,
    shape: tuple[int, ...] = SHAPE,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.5),
    ending: str = ".nii.gz",
) -> None:
    _write(folder / "labelsTr" / f"{name}{ending}", _label(shape), spacing)


def _label(shape: tuple[int, ...]) -> np.ndarray:
    label = np.zeros(shape, dtype=np.uint8)
    label[tuple(slice(size // 4, size // 2) for size in shape)] = 1
    label[tuple(slice(size // 2, 3 * size // 4) for size in shape)] = 2
    return label


def _write(file: Path, array: np.ndarray, spacing: tuple[float, float, float]) -> None:
    if file.suffix == ".png":
        imsave(file, array.astype(np.uint8), check_contrast=False)
        return
    image = sitk.GetImageFromArray(array if array.dtype == np.uint8 else array.astype(np.float32))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file))
