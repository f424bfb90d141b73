"""Corresponding positions in different cases.

Positions are relative: 0 to 1 along each axis of a case after cropping. Resampling keeps them, so that they hold in any
preprocessed configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import map_coordinates

Kind = Literal["relative", "bbox", "registration"]

_INVERSION_STEPS = 20


@dataclass(frozen=True)
class Frame:
    """How a case lies in a common space.

    Attributes:
        matrix: ``(3, 4)``; a point y of the common space is at ``matrix @ (y, 1)`` of the case.
        displacement: ``(3, *G)`` or None; added to that, sampled at the centers of the cells of a grid over the unit
            cube of the common space.
    """

    matrix: NDArray[np.float64]
    displacement: NDArray[np.float64] | None = None

    @classmethod
    def of_box(cls, box: Sequence[Sequence[float]]) -> Frame:
        """Frame in which the box, ``[[lower, upper], ...]`` in relative coordinates, is the unit cube."""
        lower, upper = np.asarray(box, float).T
        return cls(np.c_[np.diag(upper - lower), lower])

    def from_common(self, point: NDArray[np.float64]) -> NDArray[np.float64]:
        """Positions in the case of points ``(3, ...)`` of the common space."""
        placed = np.tensordot(self.matrix[:, :3], point, 1) + _column(self.matrix[:, 3], point)
        if self.displacement is None:
            return placed
        cells = np.array(self.displacement.shape[1:])
        at = (np.asarray(point, float) * _column(cells, point) - 0.5).reshape(3, -1)
        moved = np.stack([map_coordinates(part, at, order=1, mode="nearest") for part in self.displacement])
        return placed + moved.reshape(placed.shape)

    def to_common(self, point: NDArray[np.float64]) -> NDArray[np.float64]:
        """Points ``(3,)`` of the common space that lie at a position in the case.

        With a displacement by fixed-point steps, which converge where it changes slowly.
        """
        inverse = np.linalg.inv(self.matrix[:, :3])
        found = inverse @ (point - self.matrix[:, 3])
        for _ in range(_INVERSION_STEPS if self.displacement is not None else 0):
            found = found + inverse @ (point - self.from_common(found))
        return found

    def transposed(self, axes: Sequence[int]) -> Frame:
        """The frame for arrays whose axes are ``axes`` of these."""
        order = list(axes)
        matrix = self.matrix[order][:, [*order, 3]]
        if self.displacement is None:
            return Frame(matrix)
        return Frame(matrix, self.displacement[order].transpose(0, *(axis + 1 for axis in order)))


def _column(values: NDArray[np.float64], like: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.reshape(-1, *[1] * (np.ndim(like) - 1))


@dataclass(frozen=True)
class Correspondence:
    """Which positions of two cases correspond.

    Attributes:
        frames: of each case by the axes of the preprocessed arrays; empty for equal relative coordinates.
    """

    frames: Mapping[str, Frame] = field(default_factory=dict)

    def position(
        self, position: ArrayLike, source: tuple[str, Sequence[int]], target: tuple[str, Sequence[int]]
    ) -> NDArray[np.float64]:
        """The position in the ``target`` case that corresponds to one in the ``source`` case.

        Args:
            position: in voxels, of which the first ends at 1 along each axis.
            source: name and spatial shape of a case.
            target: of the other.
        """
        point = np.asarray(position, float) / np.asarray(source[1])
        if self.frames:
            point = self.frames[target[0]].from_common(self.frames[source[0]].to_common(point))
        return point * np.asarray(target[1])
