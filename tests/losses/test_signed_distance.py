from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from nnssl.losses.signed_distance import SignedDistances, normalized_signed_distance


def ball(dimensions: int, radius: float = 6, size: int = 25) -> np.ndarray:
    grid = np.indices((size,) * dimensions) - size // 2
    return (grid**2).sum(0) <= radius**2


def boundary(mask: np.ndarray) -> np.ndarray:
    """Voxels of the object with a face towards the background, by looking at every neighbor."""
    padded = np.pad(mask, 1, mode="edge")
    inner = (slice(1, -1),) * mask.ndim
    neighbors = [np.roll(padded, shift, axis)[inner] for axis in range(mask.ndim) for shift in (-1, 1)]
    return mask & ~np.logical_and.reduce(neighbors)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_a_ball(dimensions):
    mask = ball(dimensions)
    distance = normalized_signed_distance(mask)
    edge = boundary(mask)
    assert (distance[~mask] > 0).all()
    assert (distance[mask & ~edge] < 0).all()
    assert (distance[edge] == 0).all()
    assert (distance.min(), distance.max()) == (-1, 1)
    assert distance[(12,) * dimensions] == -1
    assert distance[(0,) * dimensions] == 1
    assert distance.dtype == np.float32


def test_a_row_of_voxels():
    distance = normalized_signed_distance(np.array([0, 0, 0, 0, 1, 1, 1, 1, 1, 0], bool))
    np.testing.assert_allclose(distance, [1, 0.75, 0.5, 0.25, 0, -2 / 3, -1, -2 / 3, 0, 0.25])


def test_an_object_at_the_edge_of_the_patch_goes_on_there():
    distance = normalized_signed_distance(np.array([1, 1, 1, 0], bool))
    np.testing.assert_allclose(distance, [-1, -2 / 3, 0, 1])


@pytest.mark.parametrize("value", [False, True])
def test_without_a_boundary_all_is_zero(value):
    distance = normalized_signed_distance(np.full((5, 6, 7), value))
    assert (distance == 0).all()
    assert distance.shape == (5, 6, 7)


def test_a_single_voxel_is_boundary():
    distance = normalized_signed_distance(np.arange(5) == 2)
    np.testing.assert_allclose(distance, [1, 0.5, 0, 0.5, 1])


@pytest.mark.parametrize("sampling", [None, (3.0, 1.0, 0.5)])
def test_the_inside_is_that_of_the_whole_patch(sampling):
    from scipy.ndimage import distance_transform_edt

    mask = np.random.default_rng(0).random((12, 13, 14)) > 0.3
    mask[:2], mask[:, :, 10:] = False, False
    depth = distance_transform_edt(mask, sampling=sampling)
    expected = np.where(boundary(mask), 0, depth / depth.max())
    np.testing.assert_allclose(-normalized_signed_distance(mask, sampling)[mask], expected[mask], rtol=1e-6)


def test_sampling_stretches_an_axis():
    mask = np.zeros((5, 5), bool)
    mask[0, 0] = True
    distance = normalized_signed_distance(mask, (3.0, 1.0))
    assert distance[1, 0] == pytest.approx(3 * distance[0, 1])


def test_channels_of_labels_and_of_regions():
    labels = torch.from_numpy(ball(3, 8).astype(np.int16) + ball(3, 4))[None]
    of_labels = SignedDistances((1, 2, 3))(labels)
    assert of_labels.shape == (3, 25, 25, 25)
    np.testing.assert_allclose(of_labels[0], normalized_signed_distance(ball(3, 8) & ~ball(3, 4)), atol=1e-3)
    np.testing.assert_allclose(of_labels[1], normalized_signed_distance(ball(3, 4)), atol=1e-3)
    assert not of_labels[2].any()
    assert (of_labels[1].min(), of_labels[1].max()) == (-1, 1)
    of_regions = SignedDistances(None)(torch.cat([labels > 0, labels > 1]))
    np.testing.assert_allclose(of_regions[0], normalized_signed_distance(ball(3, 8)), atol=1e-3)
    assert torch.equal(of_regions[1], of_labels[1])


def test_travels_to_worker_processes():
    function = SignedDistances((1, 2), (1.0, 2.0))
    assert pickle.loads(pickle.dumps(function)) == function
