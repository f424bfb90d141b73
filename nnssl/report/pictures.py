"""Slices of a case in three orientations with the contours of masks, as small pieces of HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnssl.errors import UserError
from nnssl.pictures.overlay import fullest_slice

_MARGIN_MM = 12.0
_MARGIN_SHARE = 0.3
_LARGEST_PICTURE = 512
# contours lie on the middle of voxel edges; corners of their steps may move by this part of a voxel
_SIMPLIFY = 0.2
_VIEWS = ("axial", "coronal", "sagittal")


@dataclass(frozen=True)
class Contour:
    """A contour: number of its mask (0 is the reference), number of its class, and the path of SVG in pixels."""

    mask: int
    class_number: int
    path: str


@dataclass(frozen=True)
class View:
    """One slice: PNG as data URI, size in pixels, width and height in mm, and contours."""

    name: str
    picture: str
    columns: int
    rows: int
    width_mm: float
    height_mm: float
    contours: list[Contour]


def case_views(image: Path, masks: Sequence[Path], classes: Mapping[str, tuple[int, ...]]) -> list[View]:
    """Views of a case: three orthogonal slices of a volume, or the one of a 2D image.

    Slices are those in which the reference, ``masks[0]`` (if it is empty, all masks together), has the most classes
    and then the largest area, cut to the masks and a margin.

    Raises:
        UserError: if a file cannot be read, or a mask does not lie on the grid of the image.
    """
    values, spacing = _read(image)
    labels = []
    for file in masks:
        label, _ = _read(file)
        if label.shape != values.shape:
            raise UserError("mask and image differ in size", where=file, expected=values.shape, found=label.shape)
        labels.append(label)
    flat = values.shape[0] == 1
    union = np.max(labels, axis=0)
    guide = labels[0] if labels[0].any() else union
    box = _box(union, spacing)
    views = []
    for axis, name in enumerate(("slice",) if flat else _VIEWS):
        index = fullest_slice(guide, axis)
        own_box, own_spacing = (parts[:axis] + parts[axis + 1 :] for parts in (box, spacing))
        # rows of the volume run from inferior to superior, rows of a picture downward
        pieces = [volume.take(index, axis)[own_box][:: 1 if axis == 0 else -1] for volume in (values, *labels)]
        rows, columns = pieces[0].shape
        contours = [
            Contour(mask, number, path)
            for mask, piece in enumerate(pieces[1:])
            for number, label_values in enumerate(classes.values())
            if (path := _path(np.isin(piece, label_values)))
        ]
        size = columns * own_spacing[1], rows * own_spacing[0]
        views.append(View(name, _png(pieces[0]), columns, rows, *size, contours))
    return views


def _read(file: Path) -> tuple[NDArray[Any], tuple[float, ...]]:
    """Voxels (inferior-superior, anterior-posterior, right-left) and spacing; a 2D image gets one slice."""
    import SimpleITK

    try:
        image = SimpleITK.ReadImage(str(file))
    except RuntimeError as error:
        raise UserError("image cannot be read", where=file, found=str(error).strip().splitlines()[-1]) from None
    if image.GetDimension() == 3:
        image = SimpleITK.DICOMOrient(image, "LPS")
    values = SimpleITK.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        values = values.mean(-1)
    spacing = tuple(reversed(image.GetSpacing()))
    return (values, spacing) if values.ndim == 3 else (values[None], (1.0, *spacing))


def _box(mask: NDArray[Any], spacing: Sequence[float]) -> tuple[slice, ...]:
    """Bounding box of the mask with a margin, the whole if the mask is empty."""
    box = []
    for axis, (size, step) in enumerate(zip(mask.shape, spacing, strict=True)):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not inside.size:
            return tuple(slice(0, length) for length in mask.shape)
        margin = int(np.ceil(max(_MARGIN_MM / step, _MARGIN_SHARE * (inside[-1] - inside[0] + 1))))
        box.append(slice(max(0, int(inside[0]) - margin), min(size, int(inside[-1]) + margin + 1)))
    return tuple(box)


def _png(piece: NDArray[Any]) -> str:
    from matplotlib.image import imsave

    step = -(-max(piece.shape) // _LARGEST_PICTURE)
    piece = np.nan_to_num(piece[::step, ::step].astype(float))
    low, high = np.percentile(piece, (1, 99))
    buffer = io.BytesIO()
    imsave(buffer, piece, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _path(mask: NDArray[np.bool_]) -> str:
    """Path of SVG around the mask; the corner of the first pixel is (0, 0). Empty for an empty mask."""
    from skimage.measure import approximate_polygon, find_contours

    if not mask.any():
        return ""
    parts = []
    for line in find_contours(np.pad(mask, 1).astype(float), 0.5):
        # the rim of one pixel and the middle of the first pixel: 1 - 0.5
        points = approximate_polygon(line, _SIMPLIFY)[:-1] - 0.5
        parts.append("M" + "L".join(f"{column:.4g} {row:.4g}" for row, column in points) + "Z")
    return "".join(parts)
