"""Surfaces of the classes of a label map, and the distances between two surfaces."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.spatial import cKDTree

# planes are worked through in blocks of about this many voxels, so that temporary arrays stay small
_BLOCK_VOXELS = 1 << 22


@dataclass(frozen=True)
class Surface:
    """Surface elements of one object: ``points`` (N, d) in mm, ``sizes`` (N,) in mm^2 (mm in 2D)."""

    points: np.ndarray
    sizes: np.ndarray


class LabelBoundaries:
    """All places where a label map changes, from which the surface of any set of labels is read off.

    The places are the cells between 2x2x2 (2D: 2x2) neighboring voxel centers that do not all have the same label.
    One pass over the volume finds them; every further work, for any number of classes, is on these few cells.
    Outside of the map is label 0, so that an object that is cut by the image border is closed there.
    """

    def __init__(self, labels: np.ndarray):
        """``labels``: unsigned integers of shape (X, Y) or (X, Y, Z); 0 belongs to no class."""
        padded = np.pad(labels, 1)
        self._shape = padded.shape
        offsets = itertools.product((0, 1), repeat=padded.ndim)
        self._steps = [int(np.ravel_multi_index(offset, padded.shape)) for offset in offsets]
        plane = padded[0].size
        rows = max(1, _BLOCK_VOXELS // plane)
        cells, corners = [], []
        for start in range(0, len(padded) - 1, rows):
            block = padded[start : start + rows + 1]
            in_block = self._changing_cells(block)
            flat = block.reshape(-1)
            corners.append(np.stack([flat[in_block + step] for step in self._steps]))
            cells.append(in_block + start * plane)
        self._cells = np.concatenate(cells)
        self._corners = np.concatenate(corners, axis=1)

    @staticmethod
    def _changing_cells(block: np.ndarray) -> np.ndarray:
        low = high = block
        for axis in range(block.ndim):
            first = (slice(None),) * axis + (slice(None, -1),)
            second = (slice(None),) * axis + (slice(1, None),)
            low, high = np.minimum(low[first], low[second]), np.maximum(high[first], high[second])
        changes = low != high
        # the indices of flatnonzero are several times faster to get than those of nonzero
        return np.ravel_multi_index(np.unravel_index(np.flatnonzero(changes), changes.shape), block.shape)

    def surface(self, labels: Iterable[int], spacing: tuple[float, ...]) -> Surface:
        """Surface of the union of ``labels``, with the voxel ``spacing`` in mm."""
        labels = list(labels)
        codes = np.zeros(self._cells.shape, np.uint8)
        for corner, values in enumerate(self._corners):
            inside = values == labels[0]
            for label in labels[1:]:
                inside |= values == label
            codes |= inside.view(np.uint8) << np.uint8(corner)
        wholly_inside = 2 ** len(self._corners) - 1
        chosen = np.flatnonzero((codes != 0) & (codes != wholly_inside))
        points = np.stack(np.unravel_index(self._cells[chosen], self._shape), axis=1) * np.asarray(spacing)
        return Surface(points, element_sizes(spacing)[codes[chosen]])


def distances_between(a: Surface, b: Surface) -> tuple[np.ndarray, np.ndarray]:
    """Distance in mm of every element of ``a`` to the nearest one of ``b``, and of every one of ``b`` to ``a``."""
    return _nearest(a.points, b.points), _nearest(b.points, a.points)


def _nearest(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    # Neither a balanced nor a compact tree: on points of a regular grid both make far queries ten times slower.
    tree = cKDTree(targets, balanced_tree=False, compact_nodes=False)
    return tree.query(points)[0]


@lru_cache(maxsize=64)
def element_sizes(spacing: tuple[float, ...]) -> np.ndarray:
    """Size of the surface in a cell for each pattern of its corners: area in mm^2, in 2D length in mm.

    The index is the sum of ``2**k`` over the corners inside, corner k being the k-th of
    ``itertools.product((0, 1), repeat=d)``. 256 patterns for three values of ``spacing`` (mm), 16 for two.
    """
    scale = np.prod(spacing) / np.asarray(spacing)
    sizes = np.array([np.linalg.norm(normals * scale, axis=1).sum() for normals in _normals(len(spacing))])
    sizes.setflags(write=False)
    return sizes


@lru_cache
def _normals(dimension: int) -> list[np.ndarray]:
    """For each corner pattern the normals (N, d) of its pieces of surface in a unit cell, their length the size."""
    count = 2**dimension
    normals = [np.zeros((1, dimension))]
    for pattern in range(1, 2**count - 1):
        corners = np.array([pattern >> corner & 1 for corner in range(count)])
        # A pattern and its inverse have the same surface. Marching cubes resolves ambiguous patterns differently
        # for the two; the one with fewer corners inside separates them.
        if corners.sum() > count // 2:
            corners = 1 - corners
        cell = corners.reshape((2,) * dimension)
        normals.append(_normals_2d(cell) if dimension == 2 else _normals_3d(cell))
    normals.append(np.zeros((1, dimension)))
    return normals


def _normals_3d(cell: np.ndarray) -> np.ndarray:
    from skimage.measure import marching_cubes

    vertices, faces, _, _ = marching_cubes(cell.astype(np.float32), 0.5, method="lorensen")
    triangles = vertices.astype(np.float64)[faces]
    return np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0]) / 2


def _normals_2d(cell: np.ndarray) -> np.ndarray:
    """Contour of a cell with one or two corners inside."""
    if cell.sum() == 2 and not np.array_equal(cell, cell[::-1, ::-1]):
        # two neighbors: one straight line, its normal along the axis on which the corners differ
        return np.array([[1.0, 0.0]]) if cell[0, 0] == cell[0, 1] else np.array([[0.0, 1.0]])
    # every other corner inside is cut off by a line between two midpoints of edges
    return np.full((int(cell.sum()), 2), 0.5)
