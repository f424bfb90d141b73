"""Flips and quarter turns, which are undone without a trace, and changes of size, which are not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import affine_grid, grid_sample

# spacings of axes that a quarter turn exchanges may differ by this share
_SPACING_TOLERANCE = 0.01


@dataclass(frozen=True)
class Symmetry:
    """Exchange of axes followed by flips, applied to the trailing (spatial) axes of a tensor.

    No value is computed, only moved: ``undo(apply(x))`` is ``x`` to the bit.

    Attributes:
        order: spatial axis i of the result is spatial axis ``order[i]`` of the input.
        flipped: spatial axes of the result that are reversed.
    """

    order: tuple[int, ...]
    flipped: tuple[int, ...] = ()

    def apply(self, patch: torch.Tensor) -> torch.Tensor:
        """``(..., *S)`` to the same shape."""
        return self._reverse(self._permute(patch, self.order))

    def undo(self, patch: torch.Tensor) -> torch.Tensor:
        """Inverse of `apply`."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return self._permute(self._reverse(patch), inverse)

    @staticmethod
    def _permute(patch: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        leading = patch.ndim - len(order)
        return patch.permute(*range(leading), *(leading + axis for axis in order))

    def _reverse(self, patch: torch.Tensor) -> torch.Tensor:
        leading = patch.ndim - len(self.order)
        return patch.flip([leading + axis for axis in self.flipped]) if self.flipped else patch


def symmetries(shape: Sequence[int], spacing: Sequence[float], mirrored: Sequence[int]) -> list[Symmetry]:
    """The group of all flips along ``mirrored`` axes and quarter turns between them that keep shape and spacing.

    A quarter turn needs two axes of equal size and spacing. Both must be mirrored ones: half a turn reverses both.

    Args:
        shape: voxels of a patch along each spatial axis.
        spacing: mm (or any unit) along each spatial axis.
        mirrored: spatial axes that may be reversed.

    Returns:
        Every element once, the identity first.

    >>> len(symmetries((8, 8), (1, 1), (0, 1))), len(symmetries((8, 8, 8), (1, 1, 1), (0, 1, 2)))
    (8, 48)
    >>> len(symmetries((8, 8, 8), (3, 1, 1), (0, 1, 2))), len(symmetries((8, 8), (1, 1), ()))
    (16, 1)
    """
    axes = range(len(shape))

    def exchangeable(a: int, b: int) -> bool:
        equal = shape[a] == shape[b] and math.isclose(spacing[a], spacing[b], rel_tol=_SPACING_TOLERANCE)
        return a == b or (equal and a in mirrored and b in mirrored)

    orders = [
        order for order in itertools.permutations(axes) if all(exchangeable(a, order[a]) for a in axes)
    ]  # an exchange of two axes is a quarter turn and a flip
    subsets = [axis for axis in axes if axis in mirrored]
    flips = [flip for count in range(len(subsets) + 1) for flip in itertools.combinations(subsets, count)]
    return [Symmetry(order, flip) for order in orders for flip in flips]


def apply_each(group: Sequence[Symmetry], patches: torch.Tensor) -> torch.Tensor:
    """Applies one symmetry to each of the patches ``(N, C, *S)``."""
    return torch.stack([symmetry.apply(patch) for symmetry, patch in zip(group, patches, strict=True)])


def undo_each(group: Sequence[Symmetry], patches: torch.Tensor) -> torch.Tensor:
    """Inverse of `apply_each`; works on any number of channels."""
    return torch.stack([symmetry.undo(patch) for symmetry, patch in zip(group, patches, strict=True)])


def resized_content(patches: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Enlarges what the patches show about their centers, linearly interpolated; zeros where nothing is known.

    Args:
        patches: ``(N, C, *S)`` with two or three spatial axes.
        factors: ``(N,)``; above 1 the content grows and loses its rim, below 1 it shrinks.

    Returns:
        The shape of ``patches``.
    """
    dimensions = patches.ndim - 2
    scaling = torch.eye(dimensions, device=patches.device, dtype=patches.dtype) / factors[:, None, None]
    theta = torch.nn.functional.pad(scaling, (0, 1))
    grid = affine_grid(theta, list(patches.shape), align_corners=False)
    return grid_sample(patches, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def resizing_keeps(shape: Sequence[int], factors: torch.Tensor) -> torch.Tensor:
    """Where `resized_content` by ``factors`` and back again is computed from voxels of the patch alone.

    Args:
        shape: voxels of the patches along each spatial axis.
        factors: ``(N,)``.

    Returns:
        Boolean ``(N, 1, *shape)``.
    """
    inside = torch.ones((len(factors), 1, *shape), device=factors.device, dtype=factors.dtype)
    return resized_content(resized_content(inside, factors), 1 / factors) > 1 - 1e-3
