"""One segmentation from those that several atlases propose."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter


def weighted_vote(
    labels: Sequence[NDArray[np.integer]], weights: Sequence[NDArray[np.floating]]
) -> NDArray[np.integer]:
    """The label with the largest sum of weights in every voxel; among equals that of the earliest atlas that has one.

    Args:
        labels: one array ``(*S)`` per atlas.
        weights: of their voxels, not negative; where all are 0 the result is background.
    """
    fused = np.zeros_like(labels[0])
    best = np.zeros(labels[0].shape, np.float32)
    for candidate in labels:
        # each atlas proposes its own label, and all that agree with it speak for that
        support = np.zeros_like(best)
        for other, weight in zip(labels, weights, strict=True):
            support += np.where(other == candidate, weight, 0)
        better = support > best
        fused[better], best[better] = candidate[better], support[better]
    return fused


def local_similarity(
    target: NDArray[np.floating], images: Sequence[NDArray[np.floating]], edge: int = 5
) -> list[NDArray[np.float32]]:
    """How alike each image is to the target around every voxel: ``1 / (local mean squared difference)^2``.

    Local weighted voting of Artaechevarria, Munoz-Barrutia & Ortiz-de-Solorzano (IEEE TMI 28(8), 2009), scaled so that
    the weights of a voxel have the sum 1.

    Args:
        target: ``(*S)``.
        images: of the same shape, brought to the target's place and range of intensities.
        edge: of the cube that is looked at, in voxels.
    """
    scale = max(float(np.std(target)), 1e-6)
    errors = [uniform_filter(np.square((image - target) / scale, dtype=np.float32), edge) for image in images]
    # a thousandth of the standard deviation is as good as no difference
    raw = [1 / np.square(np.maximum(error, 0) + 1e-6) for error in errors]
    total = np.sum(raw, 0)
    return [np.asarray(weight / total, np.float32) for weight in raw]
