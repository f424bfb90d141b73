"""Regional switch: two patches exchange the content of random boxes, images and labels alike.

The augmentation of labeled atlases that EFS-MedSeg calls 3D random regional switch (Zhou et al., Medical Image
Analysis 104, 2025, doi:10.1016/j.media.2025.103637). No more than its name is published in the open; shape, size and
number of the regions are chosen here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class RegionalSwitch:
    """How regions are drawn.

    Attributes:
        probability: of a pair of patches to be switched.
        boxes: smallest and largest number of boxes whose union is the region.
        edges: smallest and largest edge of a box, as share of the edge of the patch.
    """

    probability: float = 0.5
    boxes: tuple[int, int] = (1, 3)
    edges: tuple[float, float] = (0.25, 0.5)

    def draw(self, shape: Sequence[int], inner: Sequence[int], generator: np.random.Generator) -> torch.Tensor | None:
        """The region of a pair of patches, or None if it is not to be switched; see `random_region`."""
        if generator.random() >= self.probability:
            return None
        return random_region(shape, inner, generator, boxes=self.boxes, edges=self.edges)


def random_region(
    shape: Sequence[int],
    inner: Sequence[int],
    generator: np.random.Generator,
    *,
    boxes: tuple[int, int] = (1, 3),
    edges: tuple[float, float] = (0.25, 0.5),
) -> torch.Tensor:
    """Union of axis-aligned boxes in the middle of a patch.

    Args:
        shape: spatial shape of the patch.
        inner: shape of its central part, in which the boxes lie: what later transforms leave of the patch.
        generator: of all that is drawn.
        boxes: smallest and largest number of boxes, each number equally likely.
        edges: smallest and largest edge as share of that of the central part, uniform and independent per axis; in
            voxels they are rounded, and at least 1. Positions are uniform over all that fit.

    Returns:
        ``(*shape)``, True inside.

    Raises:
        ValueError: the central part is larger than the patch.
    """
    if any(n > outer for n, outer in zip(inner, shape, strict=True)):
        raise ValueError(f"a central part of {tuple(inner)} voxels does not fit into a patch of {tuple(shape)}")
    region = torch.zeros(tuple(shape), dtype=torch.bool)
    for _ in range(generator.integers(boxes[0], boxes[1], endpoint=True)):
        box = []
        for n, outer in zip(inner, shape, strict=True):
            edge = min(n, max(1, round(generator.uniform(*edges) * n)))
            start = (outer - n) // 2 + int(generator.integers(0, n - edge, endpoint=True))
            box.append(slice(start, start + edge))
        region[tuple(box)] = True
    return region


def switch(first: torch.Tensor, second: torch.Tensor, region: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both patches with the content of the region exchanged; nothing is blended or resampled.

    Args:
        first: ``(C, *P)``, image channels or labels.
        second: of the same shape.
        region: ``(*P)``, True inside; labels and images must be given the same one.
    """
    return torch.where(region, second, first), torch.where(region, first, second)
