from __future__ import annotations

import numpy as np
import pytest

from nnssl.evaluation import surfaces
from nnssl.evaluation.surfaces import LabelBoundaries, distances_between, element_sizes

SPACING = (3.0, 0.5, 2.0)


def surface_of(mask: np.ndarray, spacing: tuple[float, ...]) -> surfaces.Surface:
    return LabelBoundaries(mask.astype(np.uint8)).surface([1], spacing)


def pattern(cell: np.ndarray) -> int:
    return sum(int(inside) << corner for corner, inside in enumerate(cell.ravel()))


def test_a_flat_piece_has_the_area_of_the_cell_across_it():
    for axis, area in enumerate((0.5 * 2.0, 3.0 * 2.0, 3.0 * 0.5)):
        cell = np.zeros((2, 2, 2), int)
        cell[(slice(None),) * axis + (0,)] = 1
        assert element_sizes(SPACING)[pattern(cell)] == pytest.approx(area)


def test_a_single_corner_is_cut_off_by_a_triangle():
    # vertices at half the spacing along each axis: area = |a x b| / 2
    a, b, c = np.diag(SPACING) / 2
    expected = np.linalg.norm(np.cross(b - a, c - a)) / 2
    sizes = element_sizes(SPACING)
    for corner in range(8):
        assert sizes[1 << corner] == pytest.approx(expected)
        assert sizes[255 - (1 << corner)] == pytest.approx(expected)


def test_contours_in_two_dimensions():
    diagonal = np.hypot(3.0, 0.5) / 2
    expected = {
        ((1, 0), (0, 0)): diagonal,
        ((1, 1), (1, 0)): diagonal,
        ((1, 1), (0, 0)): 0.5,
        ((1, 0), (1, 0)): 3.0,
        ((1, 0), (0, 1)): 2 * diagonal,
        ((1, 1), (1, 1)): 0.0,
    }
    for cell, length in expected.items():
        assert element_sizes((3.0, 0.5))[pattern(np.array(cell))] == pytest.approx(length)


@pytest.mark.parametrize("spacing", [SPACING, SPACING[:2]])
def test_only_uniform_cells_have_no_surface(spacing):
    sizes = element_sizes(spacing)
    assert np.flatnonzero(sizes == 0).tolist() == [0, len(sizes) - 1]
    np.testing.assert_allclose(sizes, sizes[::-1])


def test_surface_area_of_a_ball_in_millimeters():
    axes = [np.arange(-24, 25) * s for s in (1.0, 0.6, 0.8)]
    ball = sum(np.ix_(*[axis**2 for axis in axes])) < 12**2
    area = surface_of(ball, (1.0, 0.6, 0.8)).sizes.sum()
    # marching cubes on a binary mask goes through the midpoints of edges: a staircase with cut corners
    assert 1.0 < area / (4 * np.pi * 12**2) < 1.12


def test_perimeter_of_a_rectangle():
    mask = np.zeros((9, 12))
    mask[2:6, 3:10] = 1
    # 4 x 7 pixels: each corner is cut by a line between midpoints
    straight = 2 * (3 * 2.0 + 6 * 0.5)
    assert surface_of(mask, (2.0, 0.5)).sizes.sum() == pytest.approx(straight + 4 * np.hypot(2.0, 0.5) / 2)


def test_an_object_at_the_image_border_is_closed():
    inner, outer = np.zeros((6, 6, 6)), np.zeros((3, 4, 5))
    inner[2:5, 1:5, 1:6] = 1
    outer[:] = 1
    np.testing.assert_allclose(
        np.sort(surface_of(inner, SPACING).sizes), np.sort(surface_of(outer, SPACING).sizes), rtol=1e-12
    )


def test_many_labels_in_one_pass_are_the_surfaces_of_their_masks():
    labels = np.random.default_rng(0).integers(0, 4, (7, 6, 5)).astype(np.uint8)
    boundaries = LabelBoundaries(labels)
    for values in ([1], [3], [1, 2], [1, 2, 3]):
        expected = surface_of(np.isin(labels, values), SPACING)
        found = boundaries.surface(values, SPACING)
        np.testing.assert_array_equal(found.points, expected.points)
        np.testing.assert_array_equal(found.sizes, expected.sizes)


@pytest.mark.parametrize("shape", [(11, 9), (9, 5, 6)])
def test_blocks_of_planes_do_not_matter(monkeypatch, shape):
    mask = np.random.default_rng(1).random(shape) < 0.4
    whole = surface_of(mask, SPACING[: len(shape)])
    monkeypatch.setattr(surfaces, "_BLOCK_VOXELS", 1)
    planes = surface_of(mask, SPACING[: len(shape)])
    np.testing.assert_array_equal(whole.points, planes.points)
    np.testing.assert_array_equal(whole.sizes, planes.sizes)


def test_distances_are_the_smallest_of_all_pairs():
    rng = np.random.default_rng(2)
    a, b = (surface_of(rng.random((6, 7, 5)) < 0.1, SPACING) for _ in range(2))
    pairs = np.linalg.norm(a.points[:, None] - b.points[None], axis=2)
    to_b, to_a = distances_between(a, b)
    np.testing.assert_allclose(to_b, pairs.min(axis=1), atol=1e-12)
    np.testing.assert_allclose(to_a, pairs.min(axis=0), atol=1e-12)
