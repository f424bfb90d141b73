r"""Overlap, surface and volume metrics of a pair of masks or label maps, in mm.

Conventions
-----------
Surfaces are those of Nikolov et al. (J Med Internet Res 23:e26151, 2021; the ``surface-distance`` package): a surface
element lies in each cell between 2x2x2 (2D: 2x2) neighboring voxel centers that are partly inside the mask. Its size
is the area (2D: length) of the marching-cubes surface in the cell in mm^2 (mm); its distance is that from the center
of the cell to the nearest such center of the other surface. Outside of the image is outside of every mask.

With elements :math:`i` of size :math:`a_i` and distance :math:`d_i`, on the reference R and the prediction P:

- HD95: the larger of the two directed values; each is the distance within which 95 % of the area lies.
- ASSD: :math:`\sum_{R, P} a_i d_i / \sum_{R, P} a_i`, one mean over both surfaces.
- NSD at a tolerance: the share :math:`\sum_{d_i \le tolerance} a_i / \sum a_i` of both surfaces. A distance that
  exceeds the tolerance by rounding only (1e-5 of it; headers hold spacings as float32) is within.

These are the values of ``surface-distance`` (ASSD: its two directed means, weighted by the areas), and NSD is also
that of ``monai.metrics.compute_surface_dice`` with ``use_subvoxels=True``. HD95 and ASSD of MONAI and medpy differ,
mostly by less than a voxel: their surfaces are the voxels at the border of the mask, each counting the same whatever
the spacing.

Empty masks: if both are empty the class is *excluded*, its metrics are NaN and its volumes 0. If one is empty this is
a *failure*: Dice, IoU and NSD are 0 and the distances are the diagonal of the image in mm.

A 3D image with an axis of length 1 (nnU-Net reads 2D images so, with spacing 999 on that axis) is treated as 2D:
distances, diagonal and volumes are those of the plane, volumes in mm^2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nnssl.evaluation.surfaces import LabelBoundaries, Surface, distances_between

Status = Literal["scored", "excluded", "failure"]

HD_PERCENT = 95
# distances and areas that differ by less are equal: spacings come from float32 headers
_TOLERANCE_SLACK = 1e-5
_AREA_SLACK = 1e-9
HIGHEST_LABEL = 2**16 - 1
_BLOCK_VOXELS = 1 << 22


@dataclass(frozen=True)
class ClassScore:
    """Metrics of one class in one case.

    ``metrics``: Dice, IoU (Jaccard index), HD95 and ASSD in mm, NSD per tolerance (named by :func:`nsd_name`),
    volume_reference, volume_prediction and volume_error (prediction minus reference) in mm^3 (2D: mm^2), and the
    voxel counts TP, FP, FN, TN, n_ref, n_pred.
    """

    status: Status
    metrics: dict[str, float]


def nsd_name(tolerance_mm: float) -> str:
    """Name of the metric NSD at a tolerance in mm.

    >>> nsd_name(1.0), nsd_name(2.5)
    ('NSD@1mm', 'NSD@2.5mm')
    """
    return f"NSD@{tolerance_mm:g}mm"


def compare_masks(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    *,
    tolerances_mm: Sequence[float] = (1.0,),
) -> ClassScore:
    """Metrics of two masks (everything that is not 0 is inside) of one shape, (X, Y) or (X, Y, Z).

    ``spacing`` in mm, one value per axis. ``ValueError`` for shapes or spacings that do not fit.

    >>> square = np.zeros((8, 8), bool)
    >>> square[2:6, 2:6] = True
    >>> compare_masks(square, np.roll(square, 1, axis=0), (0.5, 2.0)).metrics["Dice"]
    0.75
    """
    scores = compare_label_maps(
        np.asarray(reference) != 0, np.asarray(prediction) != 0, spacing, {"mask": (1,)}, tolerances_mm=tolerances_mm
    )
    return scores["mask"]


def compare_label_maps(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    classes: Mapping[str, Sequence[int]],
    *,
    ignore_label: int | None = None,
    tolerances_mm: Sequence[float] = (1.0,),
) -> dict[str, ClassScore]:
    """Metrics of every class of two label maps of one shape, (X, Y) or (X, Y, Z).

    Args:
        reference: label map, integers from 0 to 65535 (or bool).
        prediction: label map on the same grid.
        spacing: mm, one value per axis of the arrays.
        classes: name of each class and the label values it consists of; several for a region. Regions may overlap.
        ignore_label: voxels where the reference has this value are left out of both maps.
        tolerances_mm: tolerances of NSD in mm.

    Returns:
        ``{name: score}`` in the order of ``classes``.

    Raises:
        ValueError: for shapes, types, spacings, classes or tolerances that do not fit.
    """
    reference, prediction = np.asarray(reference), np.asarray(prediction)
    _check_arguments(reference, prediction, spacing, classes, ignore_label, tolerances_mm)
    reference, prediction, flat_spacing = _drop_flat_axes(reference, prediction, spacing)
    diagonal = float(np.linalg.norm(np.multiply(reference.shape, flat_spacing)))

    ids = {value: number for number, value in enumerate(sorted({v for c in classes.values() for v in c}), start=1)}
    members = {name: [ids[value] for value in dict.fromkeys(values)] for name, values in classes.items()}
    reference_ids, prediction_ids, valid = _to_ids(reference, prediction, ids, ignore_label)
    del reference, prediction
    reference_ids, prediction_ids = _crop(reference_ids, prediction_ids)
    counts = _joint_histogram(reference_ids, prediction_ids, len(ids) + 1)
    boundaries = LabelBoundaries(reference_ids), LabelBoundaries(prediction_ids)

    voxel_volume = float(np.prod(flat_spacing))
    scores = {}
    for name, own in members.items():
        metrics = _volume_metrics(counts, own, valid, voxel_volume)
        if metrics["n_ref"] and metrics["n_pred"]:
            surfaces = [boundary.surface(own, flat_spacing) for boundary in boundaries]
            metrics |= _surface_metrics(surfaces[0], surfaces[1], tolerances_mm)
            status: Status = "scored"
        elif metrics["n_ref"] or metrics["n_pred"]:
            metrics |= {"HD95": diagonal, "ASSD": diagonal} | {nsd_name(t): 0.0 for t in tolerances_mm}
            status = "failure"
        else:
            metrics |= dict.fromkeys(["HD95", "ASSD", *map(nsd_name, tolerances_mm)], np.nan)
            status = "excluded"
        scores[name] = ClassScore(status, {key: metrics[key] for key in metric_names(tolerances_mm)})
    return scores


def metric_names(tolerances_mm: Sequence[float]) -> list[str]:
    """Names of all metrics, in the order in which they are reported."""
    scores = ["Dice", "IoU", "HD95", "ASSD", *map(nsd_name, tolerances_mm)]
    volumes = ["volume_reference", "volume_prediction", "volume_error"]
    return scores + volumes + ["TP", "FP", "FN", "TN", "n_ref", "n_pred"]


def _check_arguments(
    reference: np.ndarray,
    prediction: np.ndarray,
    spacing: Sequence[float],
    classes: Mapping[str, Sequence[int]],
    ignore_label: int | None,
    tolerances_mm: Sequence[float],
) -> None:
    if reference.shape != prediction.shape:
        raise ValueError(f"reference has shape {reference.shape}, prediction {prediction.shape}")
    if reference.ndim not in (2, 3) or 0 in reference.shape:
        raise ValueError(f"expected a 2D or 3D image, found shape {reference.shape}")
    if len(spacing) != reference.ndim or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"expected {reference.ndim} positive values of spacing, found {tuple(spacing)}")
    for name, array in (("reference", reference), ("prediction", prediction)):
        if array.dtype.kind not in "bui":
            raise ValueError(f"{name} holds {array.dtype}, not integers")
        if array.min() < 0 or array.max() > HIGHEST_LABEL:
            raise ValueError(f"{name} holds values from {array.min()} to {array.max()}, not within 0..{HIGHEST_LABEL}")
    for class_name, values in classes.items():
        if not values or not all(0 <= value <= HIGHEST_LABEL for value in values):
            raise ValueError(f"class {class_name} has label values {values}, not within 0..{HIGHEST_LABEL}")
        if ignore_label in values:
            raise ValueError(f"class {class_name} contains the ignore label {ignore_label}")
    if not all(np.isfinite(t) and t >= 0 for t in tolerances_mm):
        raise ValueError(f"expected tolerances of at least 0 mm, found {tuple(tolerances_mm)}")


def _drop_flat_axes(
    reference: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """3D images with one slice become 2D."""
    kept = tuple(float(s) for s in spacing)
    if reference.ndim == 3 and 1 in reference.shape:
        axis = reference.shape.index(1)
        kept = kept[:axis] + kept[axis + 1 :]
        reference, prediction = reference.squeeze(axis), prediction.squeeze(axis)
    return reference, prediction, kept


def _to_ids(
    reference: np.ndarray, prediction: np.ndarray, ids: Mapping[int, int], ignore_label: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Label maps with dense numbers for the values that belong to a class and 0 elsewhere; number of valid voxels."""
    highest = max(int(reference.max()), int(prediction.max()), *ids)
    table = np.zeros(highest + 1, np.uint8 if len(ids) < 256 else np.uint16)
    for value, number in ids.items():
        table[value] = number
    # numpy turns indices into 64-bit integers, so plane by plane
    maps = [np.empty(reference.shape, table.dtype) for _ in range(2)]
    for source, target in zip((reference, prediction), maps, strict=True):
        for rows in _blocks(source):
            target[rows] = table[source[rows].astype(np.intp)]
    valid = reference.size
    if ignore_label is not None:
        ignored = reference == ignore_label
        for target in maps:
            target[ignored] = 0
        valid -= int(np.count_nonzero(ignored))
    return maps[0], maps[1], valid


def _crop(reference: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both maps cut to the bounding box of all that is not 0 in one of them; one voxel if there is nothing."""
    box = []
    for axis in range(reference.ndim):
        others = tuple(other for other in range(reference.ndim) if other != axis)
        occupied = np.flatnonzero(reference.any(axis=others) | prediction.any(axis=others))
        box.append(slice(occupied[0], occupied[-1] + 1) if occupied.size else slice(0, 1))
    return reference[tuple(box)], prediction[tuple(box)]


def _joint_histogram(reference: np.ndarray, prediction: np.ndarray, count: int) -> np.ndarray:
    """(count, count): voxels with each pair of numbers in reference (rows) and prediction."""
    histogram = np.zeros(count * count, np.int64)
    for rows in _blocks(reference):
        pairs = reference[rows].astype(np.intp) * count + prediction[rows]
        histogram += np.bincount(pairs.ravel(), minlength=count * count)
    return histogram.reshape(count, count)


def _blocks(array: np.ndarray) -> list[slice]:
    rows = max(1, _BLOCK_VOXELS // array[0].size)
    return [slice(start, start + rows) for start in range(0, len(array), rows)]


def _volume_metrics(counts: np.ndarray, own: list[int], valid: int, voxel_volume: float) -> dict[str, float]:
    n_ref, n_pred = int(counts[own].sum()), int(counts[:, own].sum())
    tp = int(counts[np.ix_(own, own)].sum())
    union = n_ref + n_pred - tp
    return {
        "Dice": 2 * tp / (n_ref + n_pred) if union else np.nan,
        "IoU": tp / union if union else np.nan,
        "volume_reference": n_ref * voxel_volume,
        "volume_prediction": n_pred * voxel_volume,
        "volume_error": (n_pred - n_ref) * voxel_volume,
        "TP": tp,
        "FP": n_pred - tp,
        "FN": n_ref - tp,
        "TN": valid - union,
        "n_ref": n_ref,
        "n_pred": n_pred,
    }


def _surface_metrics(reference: Surface, prediction: Surface, tolerances_mm: Sequence[float]) -> dict[str, float]:
    to_prediction, to_reference = distances_between(reference, prediction)
    distances = np.concatenate((to_prediction, to_reference))
    sizes = np.concatenate((reference.sizes, prediction.sizes))
    total = sizes.sum()
    metrics = {
        "HD95": max(_percentile(to_prediction, reference.sizes), _percentile(to_reference, prediction.sizes)),
        "ASSD": float(distances @ sizes / total),
    }
    for tolerance in tolerances_mm:
        within = distances <= tolerance * (1 + _TOLERANCE_SLACK)
        metrics[nsd_name(tolerance)] = float(sizes[within].sum() / total)
    return metrics


def _percentile(distances: np.ndarray, sizes: np.ndarray) -> float:
    """Smallest of the distances within which ``HD_PERCENT`` of the total size lies."""
    order = np.argsort(distances)
    covered = np.cumsum(sizes[order])
    needed = covered[-1] * HD_PERCENT / 100 * (1 - _AREA_SLACK)
    return float(distances[order[np.searchsorted(covered, needed)]])
