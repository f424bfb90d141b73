"""Random boxes in patches, for methods that paste a part of one patch into another.

All input channels of a patch and its labels share the mask: paste with ``torch.where(mask, patch, background)``, and
get the masks of lower resolutions from ``nnssl.losses.labels.resized_labels``, which resizes them as references are.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch


def box_edges(shape: Sequence[int], share: float | Sequence[float]) -> tuple[int, ...]:
    """Edges of a box in voxels: ``share`` of each edge of the patch, rounded down, at least 1.

    Args:
        shape: spatial shape of the patch.
        share: above 0 and at most 1, one number or one per axis.

    Raises:
        ValueError: for a share outside this range.

    >>> box_edges((112, 112, 80), 2 / 3)
    (74, 74, 53)
    """
    shares = [share] * len(shape) if isinstance(share, (int, float)) else list(share)
    if not all(0 < s <= 1 for s in shares):
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    # 2 / 3 of 96 must be 64, whichever way the product is rounded
    return tuple(max(1, math.floor(n * s + 1e-6)) for n, s in zip(shape, shares, strict=True))


def random_boxes(
    count: int, shape: Sequence[int], edges: Sequence[int], device: torch.device | None = None
) -> torch.Tensor:
    """One box per mask, uniformly placed among all positions inside the patch.

    Positions come from Python's generator, so that nothing waits for the device.

    Args:
        count: number of masks: 1 to share it over a batch, or as many as there are patches in the global batch.
        shape: spatial shape of the patch.
        edges: of the box, in voxels.
        device: of the result.

    Returns:
        ``(count, 1, *shape)``, True inside the box.

    Raises:
        ValueError: if the box is empty or larger than the patch.
    """
    if not all(0 < edge <= n for edge, n in zip(edges, shape, strict=True)):
        raise ValueError(f"a box of {tuple(edges)} voxels does not fit into a patch of {tuple(shape)}")
    masks = torch.zeros((count, 1, *shape), dtype=torch.bool, device=device)
    for mask in masks:
        corner = [random.randrange(n - edge + 1) for edge, n in zip(edges, shape, strict=True)]
        mask[(0, *(slice(c, c + edge) for c, edge in zip(corner, edges, strict=True)))] = True
    return masks
