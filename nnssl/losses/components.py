"""Cleaning of hard labels by connected components."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from acvl_utils.morphology.morphology_helper import remove_all_but_largest_component
from torch.nn.functional import max_pool2d, max_pool3d


@torch.library.custom_op("nnssl::largest_components", mutates_args=())
def largest_components(labels: torch.Tensor) -> torch.Tensor:
    """Keeps the largest connected component of each class or region in each patch; the rest becomes background.

    Voxels that touch at a corner are connected. Computed on the host: a caller on another device waits for it.

    Args:
        labels: class numbers ``(N, 1, *S)``, or regions ``(N, R, *S)`` as booleans.

    Returns:
        The same shape and number format, on the same device.
    """
    host = labels.cpu().numpy()
    cleaned = np.zeros_like(host)
    for channel, result in zip(host.reshape(-1, *host.shape[2:]), cleaned.reshape(-1, *host.shape[2:]), strict=True):
        for value in np.unique(channel[channel != 0]):
            result[remove_all_but_largest_component(channel == value)] = value
    return torch.from_numpy(cleaned).to(labels.device)


@largest_components.register_fake
def _(labels: torch.Tensor) -> torch.Tensor:
    # for tensors that have a shape and no values
    return torch.empty_like(labels)


def largest_region(mask: torch.Tensor) -> torch.Tensor:
    """The largest connected component of each mask, found on the device, which nothing waits for.

    Cells that touch at a corner are connected; of components of equal size, the one with the last cell wins. Each cell
    points to a cell of its component with a number at least as high. In each round the cells that are pointed to, and
    those that point, follow the highest pointer around them, and pointers are shortened (connected components by
    hooking and shortcutting, Shiloach & Vishkin, 1982). The number of rounds, which is fixed, grows with the logarithm
    of the number of cells.

    Args:
        mask: boolean ``(N, 1, *S)`` with two or three spatial axes and at most 2^24 cells each.

    Returns:
        Boolean ``(N, 1, *S)``, empty where the mask is.
    """
    cells = math.prod(mask.shape[2:])
    if cells > 2**24:
        raise ValueError(f"float32 cannot number {cells} cells")
    pool = {2: max_pool2d, 3: max_pool3d}[mask.ndim - 2]
    inside = mask.flatten(1)
    pointers = torch.arange(cells, device=mask.device).expand(len(mask), cells)
    for _ in range(rounds_of(cells)):
        numbers = torch.where(inside, pointers, -1).view(mask.shape).float()
        around = pool(numbers, 3, stride=1, padding=1).flatten(1).long()
        around = torch.where(inside, around, pointers)
        with _any_order():  # does not change the largest of whole numbers
            highest = pointers.scatter_reduce(1, pointers, around, "amax")
        pointers = torch.maximum(highest, around)
        for _ in range(2):
            pointers = pointers.gather(1, pointers)
    first = torch.arange(len(mask), device=mask.device)[:, None] * cells
    sizes = torch.zeros(mask.numel(), dtype=torch.long, device=mask.device)
    sizes = sizes.scatter_add(0, (pointers + first).flatten(), inside.flatten().long()).view(len(mask), cells)
    # component of the largest size; the number of its last cell decides between equals
    largest = (sizes * cells + torch.arange(cells, device=mask.device)).argmax(1, keepdim=True)
    return (inside & (pointers == largest)).view(mask.shape)


def rounds_of(cells: int) -> int:
    """Rounds of `largest_region`: about twice what spirals, meanders and random mazes need, which are the longest."""
    return math.ceil(math.log2(cells + 1))


@contextmanager
def _any_order() -> Iterator[None]:
    """Context for operations that take numbers in any order, which torch refuses on CUDA in its deterministic mode."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
