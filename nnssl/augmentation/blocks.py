"""Random blocks of a regular grid over patches, for methods that mix many parts of two patches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def block_edges(shape: Sequence[int], strides: Sequence[int], per_axis: int) -> tuple[int, ...]:
    """Edges of blocks in voxels, ``per_axis`` of which fill each axis of the patch, about.

    They are multiples of the total stride of the network, so that a mask of blocks is exact at every resolution; an
    axis of few strides has fewer blocks.

    Args:
        shape: spatial shape of the patch.
        strides: total stride of the network along each axis, in voxels.
        per_axis: at least 1.

    >>> block_edges((112, 112, 80), (16, 16, 16), 4), block_edges((128, 128, 8), (32, 32, 4), 4)
    ((32, 32, 16), (32, 32, 4))
    """
    if per_axis < 1:
        raise ValueError(f"there must be at least one block per axis, got {per_axis}")
    return tuple(
        min(n, stride * max(1, math.floor(n / per_axis / stride + 0.5)))
        for n, stride in zip(shape, strides, strict=True)
    )


def count_blocks(shape: Sequence[int], edges: Sequence[int]) -> int:
    """Blocks of a patch, the smaller ones at its end included."""
    return math.prod(_grid(shape, edges))


def random_blocks(
    count: int, shape: Sequence[int], edges: Sequence[int], share: float, device: torch.device | None = None
) -> torch.Tensor:
    """Masks of ``int(share * N)`` of the N blocks of a grid over the patch, drawn for each mask without replacement.

    Where edges do not divide the patch, the last blocks of an axis are smaller. Numbers are drawn on the device.

    Args:
        count: number of masks.
        shape: spatial shape of the patch.
        edges: of a block, in voxels.
        share: of the blocks, 0 to 1.
        device: of the result.

    Returns:
        ``(count, 1, *shape)``, True in the drawn blocks.

    Raises:
        ValueError: for a share outside this range, or blocks without voxels.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be 0 to 1, got {share}")
    if min(edges) < 1:
        raise ValueError(f"blocks must have at least one voxel per axis, got {tuple(edges)}")
    blocks = count_blocks(shape, edges)
    places = torch.rand((count, blocks), device=device).argsort(1).argsort(1)
    mask = (places < int(share * blocks)).view(count, 1, *_grid(shape, edges))
    for axis, (n, edge) in enumerate(zip(shape, edges, strict=True), 2):
        mask = mask.repeat_interleave(edge, axis).narrow(axis, 0, n)
    return mask


def _grid(shape: Sequence[int], edges: Sequence[int]) -> list[int]:
    return [math.ceil(n / edge) for n, edge in zip(shape, edges, strict=True)]
