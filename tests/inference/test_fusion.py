from __future__ import annotations

import numpy as np
import pytest

from nnssl.inference.fusion import local_similarity, weighted_vote


def test_the_majority_wins_and_the_first_atlas_decides_ties():
    labels = [np.array(row) for row in ([1, 1, 3, 0], [2, 1, 2, 1], [2, 0, 1, 1])]
    ones = [np.ones(4)] * 3
    assert weighted_vote(labels, ones).tolist() == [2, 1, 3, 1]


def test_weights_decide_and_voxels_without_weight_are_background():
    labels = [np.array([1, 1, 5]), np.array([2, 2, 5]), np.array([2, 2, 5])]
    weights = [np.array([0.9, 0.3, 0.0]), np.array([0.2, 0.2, 0.0]), np.array([0.2, 0.2, 0.0])]
    assert weighted_vote(labels, weights).tolist() == [1, 2, 0]


@pytest.mark.parametrize("shape", [(12, 20), (6, 12, 20)])
def test_local_similarity_prefers_the_atlas_that_is_alike_there(shape):
    target = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    left, right = target.copy(), target.copy()
    left[..., 10:] += 1
    right[..., :10] += 1
    first, second = local_similarity(target, [left, right], edge=3)
    np.testing.assert_allclose(first + second, 1, rtol=1e-5)
    assert (first[..., :8] > 0.99).all()
    assert (second[..., 12:] > 0.99).all()


def test_equal_atlases_weigh_the_same():
    target = np.ones((4, 4, 4), np.float32)
    for weights in local_similarity(target, [target * 2, target * 2]):
        assert (weights == 0.5).all()
