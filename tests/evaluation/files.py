"""Small folders of labels and predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from skimage import io

SHAPE = (9, 12, 10)
SPACING = (0.8, 1.25, 2.0)
LABELS = {"background": 0, "left": 1, "right": 2}


def label_map(seed: int, noise: float = 0.0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Labels 0, 1, 2 from a smooth field; two maps of one seed differ by ``noise`` only."""
    field, other = (
        ndimage.gaussian_filter(np.random.default_rng([seed, part]).normal(size=shape), 2) for part in (0, 1)
    )
    edges = np.quantile(field, [0.6, 0.8])
    return np.digitize(field + noise * other, edges).astype(np.uint8)


def write_labels(path: Path, array: np.ndarray, **geometry: Any) -> None:
    """Writes PNG, or an image of SimpleITK with ``spacing``, ``origin``, ``direction`` in its order."""
    if path.suffix == ".png":
        io.imsave(path, array, check_contrast=False)
        return
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(geometry.get("spacing", SPACING[: array.ndim]))
    for name in ("origin", "direction"):
        if name in geometry:
            getattr(image, f"Set{name.title()}")(geometry[name])
    sitk.WriteImage(image, str(path))


def make_folders(
    folder: Path, ending: str = ".nii.gz", cases: int = 3, shape: tuple[int, ...] = SHAPE, **dataset_json: Any
) -> tuple[Path, Path]:
    """``gt`` and ``pred`` with cases a, b, ... and a ``dataset.json`` beside the predictions."""
    reference, prediction = folder / "gt", folder / "pred"
    for part in (reference, prediction):
        part.mkdir(parents=True)
    for seed in range(cases):
        case = "abcdefgh"[seed] + ending
        write_labels(reference / case, label_map(seed, shape=shape))
        write_labels(prediction / case, label_map(seed, 0.4, shape))
    description = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": 3, "file_ending": ending}
    (prediction / "dataset.json").write_text(json.dumps(description | dataset_json))
    return reference, prediction
