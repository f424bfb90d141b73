"""Pictures of patches with the contours of their labels, and of how sure a network is of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nnssl.pictures.overlay import class_colors, draw_contours, fullest_slice
from nnssl.utils.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCHES = 2.6


@dataclass(frozen=True)
class Patch:
    """An image ``(*P)`` (the first channel), labels ``(*P)`` or None, and what is written above it.

    Where ``is_confidence``, the image is one of confidences between 0 and 1, which are shown in colors.
    """

    title: str
    image: NDArray[Any]
    labels: NDArray[Any] | None
    is_confidence: bool = False


def save_patches(
    path: Path,
    patches: Sequence[Patch],
    class_names: Mapping[int, str],
    spacing: Sequence[float],
    *,
    title: str = "",
    columns: int = 4,
) -> Path:
    """Writes a PNG of patches side by side, contours of their labels in the colors of the classes.

    A patch in 3D is shown in the slice, across the axis of the largest spacing, that has the most labels.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = -(-len(patches) // columns)
    figure = Figure(figsize=(_INCHES * columns, (_INCHES + 0.3) * rows + 0.8), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    colors = class_colors(class_names)
    scale = None
    for ax in axes.flat:
        ax.set_axis_off()
    for patch, ax in zip(patches, axes.flat, strict=False):
        picture = _draw(ax, patch, spacing, colors)
        scale = picture if patch.is_confidence else scale
    drawn = {value for patch in patches if patch.labels is not None for value in np.unique(patch.labels)}
    lines = [Line2D([], [], color=colors[value], label=class_names[value]) for value in class_names if value in drawn]
    if lines:
        figure.legend(handles=lines, loc="outside lower center", ncols=2 * columns, fontsize="small")
    if scale is not None:
        figure.colorbar(scale, ax=axes, label="confidence", shrink=0.8)
    figure.suptitle(title)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return path


def thickest_axis(spacing: Sequence[float]) -> int:
    """The axis of the largest spacing, across which slices look least distorted."""
    return int(np.argmax(spacing))


def _draw(ax: Axes, patch: Patch, spacing: Sequence[float], colors: Mapping[int, Any]) -> Any:
    """Draws one patch; returns the drawn image, which a scale of colors can be made for."""
    image, labels, aspect = cut(patch, spacing)
    if patch.is_confidence:
        drawn = ax.imshow(image, cmap="viridis", vmin=0, vmax=1, aspect=aspect)
    else:
        low, high = np.percentile(image, (1, 99))
        drawn = ax.imshow(image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=aspect)
    if labels is not None:
        draw_contours(ax, labels, colors, linestyles="solid", linewidths=1.2)
    ax.set_title(patch.title, fontsize="small")
    return drawn


def cut(patch: Patch, spacing: Sequence[float]) -> tuple[NDArray[Any], NDArray[Any] | None, float]:
    """Image and labels in 2D, and height of a pixel divided by its width."""
    image, labels, spacing = patch.image, patch.labels, list(spacing)
    if image.ndim == 3:
        axis = thickest_axis(spacing)
        index = image.shape[axis] // 2 if labels is None else fullest_slice(labels.clip(0), axis)
        image, labels = image.take(index, axis), None if labels is None else labels.take(index, axis)
        del spacing[axis]
    return image, labels, spacing[-2] / spacing[-1]
