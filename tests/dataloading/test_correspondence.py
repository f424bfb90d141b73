from __future__ import annotations

import numpy as np
import pytest

from nnssl.dataloading.correspondence import Correspondence, Frame

AFFINE = Frame(np.array([[0.8, 0.1, 0, 0.05], [-0.1, 0.9, 0.05, 0.1], [0, 0, 1.1, -0.02]]))


def bent() -> Frame:
    """A displacement by a few percent that varies slowly."""
    grid = (np.indices((12, 12, 12)) + 0.5) / 12
    return Frame(AFFINE.matrix, 0.03 * np.sin(3 * grid[[1, 2, 0]]))


@pytest.mark.parametrize("frame", [AFFINE, bent(), Frame.of_box([(0.2, 0.4), (0, 1), (0.5, 0.9)])])
def test_there_and_back(frame):
    for point in np.random.default_rng(0).uniform(0.1, 0.9, (10, 3)):
        np.testing.assert_allclose(frame.to_common(frame.from_common(point)), point, atol=1e-6)


def test_a_box_is_the_unit_cube_of_its_frame():
    frame = Frame.of_box([(0.2, 0.4), (0, 1), (0.5, 0.9)])
    np.testing.assert_allclose(frame.from_common(np.zeros(3)), [0.2, 0, 0.5])
    np.testing.assert_allclose(frame.from_common(np.ones(3)), [0.4, 1, 0.9])
    grid = np.random.default_rng(0).uniform(size=(3, 4, 5))
    np.testing.assert_allclose(frame.from_common(grid)[:, 1, 2], frame.from_common(grid[:, 1, 2]))


@pytest.mark.parametrize("frame", [AFFINE, bent()])
@pytest.mark.parametrize("axes", [(2, 0, 1), (1, 0, 2), (0, 1, 2)])
def test_transposed_arrays_have_transposed_frames(frame, axes):
    point = np.array([0.3, 0.5, 0.8])
    turned = frame.transposed(axes).from_common(point[list(axes)])
    np.testing.assert_allclose(turned, frame.from_common(point)[list(axes)], atol=1e-12)


def test_relative_coordinates_without_frames():
    position = Correspondence().position([5, 10, 20], ("a", (10, 20, 40)), ("b", (40, 10, 40)))
    np.testing.assert_allclose(position, [20, 5, 20])


def test_positions_of_frames_are_in_voxels():
    frames = {"a": Frame.of_box([(0, 0.5)] * 3), "b": Frame.of_box([(0.5, 1)] * 3)}
    position = Correspondence(frames).position([5, 5, 5], ("a", (20, 20, 20)), ("b", (40, 40, 80)))
    np.testing.assert_allclose(position, [30, 30, 60])
