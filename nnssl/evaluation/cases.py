"""One case: read reference and prediction, refuse what cannot be compared, compute the metrics."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.dataset.volumes import Geometry, UnusableFile, read_volume
from nnssl.errors import UserError
from nnssl.evaluation.labels import EvaluationLabels
from nnssl.evaluation.metrics import HIGHEST_LABEL, ClassScore, compare_label_maps

_BLOCK = 1 << 22
_TIFF = (".tif", ".tiff")


@dataclass(frozen=True)
class CaseTask:
    """All that a worker needs for one case. ``reader_writer`` is a class of nnU-Net."""

    case: str
    reference_file: Path
    prediction_file: Path
    reader_writer: type
    labels: EvaluationLabels
    tolerances_mm: tuple[float, ...]


@dataclass(frozen=True)
class CaseResult:
    """Result of one case.

    Attributes:
        scores: by class name.
        not_evaluated: label values of the files that belong to no class (without 0 and the ignore label).
        unit: of distances: mm, or pixels (2D) or voxels (3D) if the files do not tell the spacing.
        orthonormal: False if the voxel axes are sheared, for which distances and volumes in mm are wrong.
    """

    scores: dict[str, ClassScore]
    not_evaluated: frozenset[int]
    unit: str = "mm"
    orthonormal: bool = True

    def plain(self) -> dict[str, Any]:
        """The same as plain values, which another process can be sent as JSON; `of_plain` is the way back."""
        scores = {name: asdict(score) for name, score in self.scores.items()}
        return {
            "scores": scores,
            "not_evaluated": sorted(map(int, self.not_evaluated)),
            "unit": self.unit,
            "orthonormal": self.orthonormal,
        }

    @classmethod
    def of_plain(cls, values: dict[str, Any]) -> CaseResult:
        scores = {name: ClassScore(**score) for name, score in values["scores"].items()}
        return cls(scores, frozenset(values["not_evaluated"]), values["unit"], values["orthonormal"])


def evaluate_case(task: CaseTask) -> CaseResult:
    """Metrics of one case.

    ``UserError`` naming case and file if a file cannot be read or is no label map, if the grids differ, or if a file
    holds a label value that is not declared.
    """
    reference, reference_geometry = _read_label_map(task.reference_file, task)
    prediction, geometry = _read_label_map(task.prediction_file, task)
    if differences := geometry.differences(reference_geometry):
        raise UserError(
            "prediction and reference are not on the same grid",
            where=f"case {task.case}, {task.prediction_file}",
            expected=f"the grid of {task.reference_file}",
            found="; ".join(differences),
            fix="predict from the image that belongs to the reference, or resample the prediction to the reference",
        )
    known = {0, task.labels.ignore_label, *(value for values in task.labels.classes.values() for value in values)}
    not_evaluated = _check_values(reference, task.reference_file, task) | _check_values(
        prediction, task.prediction_file, task
    )
    scores = compare_label_maps(
        reference,
        prediction,
        reference_geometry.spacing,
        task.labels.classes,
        ignore_label=task.labels.ignore_label,
        tolerances_mm=task.tolerances_mm,
    )
    unit = _unit(task.reference_file, reference_geometry)
    return CaseResult(scores, frozenset(not_evaluated - known), unit, reference_geometry.is_orthonormal())


def _unit(file: Path, geometry: Geometry) -> str:
    """Unit of distances; nnU-Net takes a spacing of 1 for PNG, and for TIFF without a JSON file beside it."""
    if geometry.affine is not None or (file.suffix.lower() in _TIFF and file.with_suffix(".json").is_file()):
        return "mm"
    return "pixels" if geometry.dimension == 2 else "voxels"


def _read_label_map(file: Path, task: CaseTask) -> tuple[np.ndarray, Geometry]:
    where = f"case {task.case}, {file}"
    try:
        volume = read_volume(str(file), task.reader_writer, is_label=True)
    except UnusableFile as problem:
        raise UserError(f"label file {problem}", where=where, fix="write the file again") from problem
    array, geometry = volume.array, volume.geometry
    if array.shape[0] != 1:
        raise UserError(
            "label file has several channels",
            where=where,
            expected="one channel with label values",
            found=f"{array.shape[0]} channels",
            fix="save the labels as single-channel (gray) image",
        )
    lowest, highest = float(array.min()), float(array.max())
    # NaN fails every comparison
    if volume.replaced_values or not (lowest >= 0 and highest <= HIGHEST_LABEL):
        found = f"values from {lowest:g} to {highest:g}"
        if volume.replaced_values:
            found += f", and {volume.replaced_values} voxels that are not finite"
        raise UserError("not a label map", where=where, expected=f"values from 0 to {HIGHEST_LABEL}", found=found)
    labels = array[0].astype(np.uint8 if highest < 256 else np.uint16)
    if not np.array_equal(labels, array[0]):
        example = array[0][labels != array[0]][0]
        raise UserError(
            "not a label map",
            where=where,
            expected="whole numbers",
            found=f"the value {example!s}",
            fix="resample labels with nearest neighbors",
        )
    return labels, geometry


def _check_values(array: np.ndarray, file: Path, task: CaseTask) -> set[int]:
    """Label values of the file; ``UserError`` if one is not declared."""
    counts = np.zeros(HIGHEST_LABEL + 1, np.int64)
    flat = array.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        block = np.bincount(flat[start : start + _BLOCK])
        counts[: block.size] += block
    values = set(np.flatnonzero(counts).tolist())
    declared = task.labels.declared
    if declared is not None and not values <= declared:
        undeclared = sorted(values - declared)
        raise UserError(
            "file holds label values that dataset.json does not declare",
            where=f"case {task.case}, {file}",
            expected="only " + ", ".join(map(str, sorted(declared))),
            found=", ".join(f"{value} ({counts[value]} voxels)" for value in undeclared[:10]),
            fix="use the dataset.json of these labels (-djfile), or name the values to evaluate (-l)",
        )
    return values
