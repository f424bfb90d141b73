"""Pictures of slices with the contours of a reference and of predictions."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nnssl.errors import UserError
from nnssl.utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMN_INCHES = 3.0
_REFERENCE_TITLE = "Reference"


@dataclass(frozen=True)
class OverlayCase:
    """Files of one row: an image (one channel), its reference mask, and masks by the title of their column.

    ``captions`` holds a short text per column title, such as a Dice, that is written below the picture.
    """

    name: str
    image: Path
    reference: Path
    predictions: Mapping[str, Path]
    captions: Mapping[str, str] = field(default_factory=dict)


def save_overlay(
    path: str | os.PathLike[str], cases: Sequence[OverlayCase], class_names: Mapping[int, str], *, title: str = ""
) -> Path:
    """Writes a PNG with one row per case and one column for the reference and for each prediction.

    Each picture is the slice, across the axis of the largest spacing, in which the reference has the most classes and
    then the largest area. Masks are drawn as solid contours, one color per class of ``class_names`` (value: name); in
    the columns of predictions the reference is dashed.

    Raises:
        UserError: if there is no case, cases have different predictions, or the masks of a case do not lie on the
            grid of its image.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = _columns(cases)
    colors = class_colors(class_names)
    rows = [_read_slices(case) for case in cases]
    caption = 0.25 if any(case.captions for case in cases) else 0.1
    heights = [
        image.shape[0] * aspect / image.shape[1] * (_COLUMN_INCHES - 0.15) + caption for image, _, aspect in rows
    ]
    size = (_COLUMN_INCHES * len(columns), sum(heights) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, height_ratios=heights)
    for case, (image, masks, aspect), row in zip(cases, rows, axes, strict=True):
        for column, ax in zip(columns, row, strict=True):
            low, high = np.percentile(image, (1, 99))
            ax.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
            draw_contours(ax, masks[column], colors, linestyles="solid", linewidths=1.5)
            if column != _REFERENCE_TITLE:
                draw_contours(ax, masks[_REFERENCE_TITLE], colors, linestyles="dashed", linewidths=0.8)
            ax.set(xticks=[], yticks=[], xlabel=case.captions.get(column, ""))
        row[0].set_ylabel(case.name)
    for column, ax in zip(columns, axes[0], strict=True):
        ax.set_title(column)
    lines = [Line2D([], [], color=colors[value], label=name) for value, name in class_names.items()]
    lines.append(Line2D([], [], color="gray", linestyle="dashed", label="reference, in columns of predictions"))
    figure.legend(handles=lines, loc="outside lower center", ncols=max(1, len(columns)), fontsize="small")
    if title:
        figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return Path(path)


def _columns(cases: Sequence[OverlayCase]) -> list[str]:
    if not cases:
        raise UserError("an overlay needs at least one case")
    titles = list(cases[0].predictions)
    for case in cases:
        if list(case.predictions) != titles:
            raise UserError(
                "the cases of an overlay have different predictions",
                where=case.name,
                expected=", ".join(titles),
                found=", ".join(case.predictions),
            )
    return [_REFERENCE_TITLE, *titles]


def class_colors(class_names: Mapping[int, str]) -> dict[int, Any]:
    """A color of matplotlib for each class."""
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(class_names) <= 10 else "tab20"]
    return {value: palette(index % palette.N) for index, value in enumerate(class_names)}


def _read_slices(case: OverlayCase) -> tuple[NDArray[Any], dict[str, NDArray[Any]], float]:
    """Image slice, mask slices by column, and height of a pixel divided by its width."""
    image, spacing = _read(case.image)
    masks = {}
    for column, file in {_REFERENCE_TITLE: case.reference, **case.predictions}.items():
        masks[column], _ = _read(file)
        if masks[column].shape != image.shape:
            raise UserError(
                "the mask does not lie on the grid of the image",
                where=file,
                expected=f"shape {image.shape}, as {case.image}",
                found=masks[column].shape,
            )
    axis = int(np.argmax(spacing)) if image.ndim == 3 else None
    if axis is not None:
        index = fullest_slice(masks[_REFERENCE_TITLE], axis)
        image = image.take(index, axis)
        masks = {column: mask.take(index, axis) for column, mask in masks.items()}
        spacing = spacing[:axis] + spacing[axis + 1 :]
    return image, masks, spacing[0] / spacing[1]


def _read(file: Path) -> tuple[NDArray[Any], tuple[float, ...]]:
    """Voxels and spacing of an image file, slowest axis first; color channels are averaged."""
    import SimpleITK

    try:
        image = SimpleITK.ReadImage(str(file))
    except RuntimeError as error:
        raise UserError("image cannot be read", where=file, found=str(error).strip().splitlines()[-1]) from None
    values = SimpleITK.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        values = values.mean(-1)
    return values, tuple(reversed(image.GetSpacing()))


def fullest_slice(mask: NDArray[Any], axis: int) -> int:
    """Index of the slice across ``axis`` in which the mask has the most classes, and of those the largest area.

    The middle one if the mask is empty.
    """
    if not mask.any():
        return mask.shape[axis] // 2
    slices = np.moveaxis(mask, axis, 0).reshape(mask.shape[axis], -1)
    classes = sum((slices == value).any(1).astype(int) for value in np.unique(mask) if value)
    return int(np.lexsort(((slices > 0).sum(1), np.broadcast_to(classes, len(slices))))[-1])


def draw_contours(ax: Axes, mask: NDArray[Any], colors: Mapping[int, Any], **style: Any) -> None:
    """Draws the contours of all classes of a 2D mask onto a picture of its shape; ``style`` is matplotlib's."""
    # a rim of background closes the contours of structures that touch the edge of the image
    padded = np.pad(mask, 1)
    rows, columns = (np.arange(-1, n + 1) for n in mask.shape)
    for value, color in colors.items():
        if (mask == value).any():
            ax.contour(columns, rows, padded == value, levels=[0.5], colors=[color], **style)
    ax.set_xlim(-0.5, mask.shape[1] - 0.5)
    ax.set_ylim(mask.shape[0] - 0.5, -0.5)
