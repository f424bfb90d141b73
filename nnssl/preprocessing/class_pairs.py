"""How alike the classes of labeled cases look, and in which order they lie: what decides which axes may be mirrored.

Both are taken within each case, from the arrays as the reader delivers them. Cropping, resampling and nnU-Net's
normalization of images keep them: positions and intensities of a case are scaled, none of which changes an order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from scipy.ndimage import find_objects

LEAST_OFFSET = 0.5
"""Centroids that are nearer than this, in units of the mean standard deviation of both classes' voxel positions along
the axis, have no order. Paired organs that share a label are wide along their axis, so their centroids have none."""

_RANKS = 256
_SORTED_VOXELS = 100_000

Pair = tuple[int, int]


@dataclass(frozen=True)
class PairInCase:
    """Two classes in one case.

    Attributes:
        overlap: 1 minus the Kolmogorov-Smirnov distance of their voxel intensities, 0 to 1; of several channels that
            which tells them apart best. Where the densities cross once it is the overlap coefficient; unlike one
            made of histograms it has no bins, and no scale on which intensities would have to be comparable.
        order: per axis 1 if the centroid of the first class lies at smaller indices than that of the second, -1 if
            at larger ones, 0 if they are nearer than `LEAST_OFFSET`.
    """

    overlap: float
    order: tuple[int, ...]


@dataclass(frozen=True)
class _ClassInCase:
    center: np.ndarray
    deviation: np.ndarray
    intensities: list[np.ndarray]


def pairs_in_case(image: np.ndarray, segmentation: np.ndarray, labels: Iterable[int]) -> dict[Pair, PairInCase]:
    """All pairs of classes that a case has.

    Args:
        image: ``(C, *S)``.
        segmentation: ``(*S)``.
        labels: label values of the classes; other values (background, ignore label) are left out.

    Returns:
        ``{(lower label, higher label): ...}``, axes in the order of the arrays.
    """
    classes = dict(_classes(image, segmentation, labels))
    return {pair: _compare(*(classes[label] for label in pair)) for pair in combinations(sorted(classes), 2)}


def combine(units: Sequence[Sequence[Mapping[Pair, PairInCase]]]) -> list[dict[str, Any]]:
    """Counts over cases, as the fingerprint holds them.

    Args:
        units: cases that vote together (scans of one patient are no independent evidence), each as from
            `pairs_in_case`. If they do not agree on an order, their vote is for none.

    Returns:
        For each pair that some case has: ``labels``; ``overlap``, the mean over cases; ``votes``, the number of units
        that have both classes; ``before`` and ``after``, per axis how many of these vote for the first class to lie
        at smaller, and at larger, indices.
    """
    counted = []
    for pair in sorted({pair for unit in units for case in unit for pair in case}):
        present = [found for unit in units if (found := [case[pair] for case in unit if pair in case])]
        votes = [_vote([case.order for case in unit]) for unit in present]
        counted.append(
            {
                "labels": list(pair),
                "overlap": round(float(np.mean([case.overlap for unit in present for case in unit])), 4),
                "votes": len(votes),
                "before": [sum(order > 0 for order in axis) for axis in zip(*votes, strict=True)],
                "after": [sum(order < 0 for order in axis) for axis in zip(*votes, strict=True)],
            }
        )
    return counted


def _vote(orders: list[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(axis[0] if len(set(axis)) == 1 else 0 for axis in zip(*orders, strict=True))


def _classes(image: np.ndarray, segmentation: np.ndarray, labels: Iterable[int]) -> Iterator[tuple[int, _ClassInCase]]:
    boxes = find_objects(segmentation.astype(np.int32))
    for label in labels:
        box = boxes[label - 1] if label <= len(boxes) else None
        if box is None:
            continue
        inside = segmentation[box] == label
        moments = [_moments(inside, axis) for axis in range(inside.ndim)]
        yield (
            label,
            _ClassInCase(
                center=np.array([mean + edge.start for (mean, _), edge in zip(moments, box, strict=True)]),
                deviation=np.array([deviation for _, deviation in moments]),
                intensities=[_ranked(channel[box][inside]) for channel in image],
            ),
        )


def _moments(inside: np.ndarray, axis: int) -> tuple[float, float]:
    """Mean and standard deviation of the positions of voxels along an axis; voxels are one wide, not points."""
    counts = inside.sum(axis=tuple(other for other in range(inside.ndim) if other != axis))
    positions = np.arange(counts.size)
    mean = np.average(positions, weights=counts)
    return float(mean), float(np.sqrt(np.average((positions - mean) ** 2, weights=counts) + 1 / 12))


def _ranked(values: np.ndarray) -> np.ndarray:
    """Evenly spaced order statistics, by which the distribution is known well enough."""
    ordered = np.sort(values[:: max(1, values.size // _SORTED_VOXELS)])
    return ordered[np.linspace(0, ordered.size - 1, min(ordered.size, _RANKS)).round().astype(int)]


def _compare(first: _ClassInCase, second: _ClassInCase) -> PairInCase:
    distances = [_ks_distance(*both) for both in zip(first.intensities, second.intensities, strict=True)]
    offset = (second.center - first.center) / ((first.deviation + second.deviation) / 2)
    order = np.where(np.abs(offset) < LEAST_OFFSET, 0, np.sign(offset)).astype(int)
    return PairInCase(1 - max(distances), tuple(order.tolist()))


def _ks_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Largest difference of two empirical distribution functions of sorted samples; scipy takes 25 times as long."""
    both = np.concatenate([first, second])
    shares = [np.searchsorted(values, both, side="right") / values.size for values in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())
