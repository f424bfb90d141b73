"""Whether the classes of labeled cases have a common place, under a given correspondence of positions.

Labels of two cases are compared on a grid over their common space: the mean Dice over classes, and what it would be if
the classes lay anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from nnssl.dataloading.correspondence import Frame

GRID = 48
"""Cells along each axis of the common space."""
SMALLEST_SHARE = 0.1
"""Of the voxels of a class's largest connected component, that smaller ones need to count for the foreground box."""
MOST_CASES = 20
"""Of more labeled cases, this many are compared: 190 pairs, from which the mean is known well enough."""

WHOLE = [[0.0, 1.0]] * 3
"""The box of a case without foreground."""

Grid = NDArray[np.uint8]


@dataclass(frozen=True)
class Overlap:
    """Mean over pairs of cases and classes; ``chance`` is the Dice of as many voxels at random places."""

    dice: float
    chance: float

    @property
    def beyond_chance(self) -> float:
        """Share of what is possible beyond chance: 0 for classes without a common place, 1 for identical cases."""
        return (self.dice - self.chance) / (1 - self.chance) if self.chance < 1 else 0.0


def class_grid(segmentation: np.ndarray, labels: Sequence[int], frame: Frame) -> Grid:
    """Class at the center of each cell of the common space: position in ``labels`` from 1 on, 0 for all else.

    Args:
        segmentation: ``(*S)`` with three axes.
        labels: label values of the classes.
        frame: of the case, by the axes of ``segmentation``.
    """
    centers = (np.indices((GRID,) * 3) + 0.5) / GRID
    shape = np.reshape(segmentation.shape, (3, 1, 1, 1))
    voxels = np.floor(frame.from_common(centers) * shape).astype(int)
    inside = ((voxels >= 0) & (voxels < shape)).all(0)
    values = segmentation[tuple(np.clip(voxels, 0, shape - 1))]
    classes = np.zeros(values.shape, np.uint8)
    for number, label in enumerate(labels, 1):
        classes[inside & (values == label)] = number
    return classes


def foreground_box(segmentation: np.ndarray, labels: Sequence[int]) -> list[list[float]]:
    """``[[lower, upper], ...]`` of all classes in relative coordinates; the whole case if it has none of them.

    Of each class its connected components count, corners included, that have at least `SMALLEST_SHARE` of the voxels of
    its largest one, so that a stray voxel does not move the box.

    Args:
        segmentation: ``(*S)``, integers.
        labels: label values of the classes, above 0.
    """
    boxes = []
    present = ndimage.find_objects(np.maximum(segmentation, 0).astype(np.int32), max(labels, default=0))
    for label in labels:
        place = present[label - 1]
        if place is not None:
            begin = np.array([edge.start for edge in place])
            boxes += [box + begin[:, None] for box in _large_components(segmentation[place] == label)]
    if not boxes:
        return WHOLE
    lower, upper = np.min(boxes, 0)[:, 0], np.max(boxes, 0)[:, 1]
    return (np.stack([lower, upper], 1) / np.reshape(segmentation.shape, (-1, 1))).tolist()


def _large_components(mask: NDArray[np.bool_]) -> list[NDArray[np.intp]]:
    """Boxes ``(dimensions, 2)`` of the components that count."""
    components, _ = ndimage.label(mask, np.ones((3,) * mask.ndim))
    sizes = np.bincount(components.ravel())[1:]
    boxes = [np.array([(edge.start, edge.stop) for edge in place]) for place in ndimage.find_objects(components)]
    return [box for box, size in zip(boxes, sizes, strict=True) if size >= SMALLEST_SHARE * sizes.max()]


def compared_pairs(units: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Pairs of cases to compare, of `MOST_CASES` at most.

    Args:
        units: cases that belong together (scans of one patient); pairs are of two of them, or of one if there is no
            other.
    """
    evenly = np.linspace(0, len(units) - 1, min(len(units), MOST_CASES)).round().astype(int)
    chosen = [units[i] for i in evenly]
    if len(chosen) == 1:
        return list(combinations(chosen[0][:MOST_CASES], 2))
    return list(combinations([unit[0] for unit in chosen], 2))


def mean_overlap(pairs: Sequence[tuple[Grid, Grid]]) -> Overlap:
    """Overlap of pairs of grids as `class_grid` makes them; classes that neither of a pair has are left out."""
    counted = np.array([counts for a, b in pairs for counts in _counts(a, b)], float).reshape(-1, 3)
    both, first, second = counted.T
    if not len(counted):
        return Overlap(0.0, 0.0)
    total = first + second
    return Overlap(float(np.mean(2 * both / total)), float(np.mean(2 * first * second / total / GRID**3)))


def most_typical(grids: Mapping[str, Grid], pairs: Sequence[tuple[str, str]]) -> str:
    """The case that overlaps the others best, of those in ``pairs``."""
    overlaps: dict[str, list[float]] = {}
    for a, b in pairs:
        dice = mean_overlap([(grids[a], grids[b])]).dice
        overlaps.setdefault(a, []).append(dice)
        overlaps.setdefault(b, []).append(dice)
    return max(overlaps, key=lambda case: np.mean(overlaps[case]))


def _counts(first: Grid, second: Grid) -> Iterator[tuple[int, int, int]]:
    """For each class of either: cells of both, of the first, of the second."""
    size = int(max(first.max(), second.max())) + 1
    joint = np.bincount(first.ravel().astype(int) * size + second.ravel(), minlength=size * size).reshape(size, size)
    for number in range(1, size):
        a, b = joint[number].sum(), joint[:, number].sum()
        if a + b > 0:
            yield joint[number, number], a, b
