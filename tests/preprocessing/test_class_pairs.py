from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ks_2samp

from nnssl.preprocessing.class_pairs import PairInCase, combine, pairs_in_case

SHAPE = (16, 20, 24)


def box(*edges: tuple[int, int]) -> tuple[slice, ...]:
    return tuple(slice(*edge) for edge in edges)


def case(*boxes: tuple[slice, ...], means: tuple[float, ...] | None = None, seed: int = 0):
    """Image (1, *SHAPE) of unit noise and label map with one box per class, the classes shifted by ``means``."""
    segmentation = np.zeros(SHAPE, np.int16)
    image = np.random.default_rng(seed).normal(size=(1, *SHAPE))
    for label, place in enumerate(boxes, 1):
        segmentation[place] = label
        image[0][place] += (means or (0,) * len(boxes))[label - 1]
    return image, segmentation


LEFT = box((4, 12), (4, 12), (2, 8))
RIGHT = box((4, 12), (4, 12), (14, 20))


def test_order_is_that_of_the_centroids():
    (found,) = pairs_in_case(*case(LEFT, RIGHT), [1, 2]).values()
    assert found.order == (0, 0, 1)
    (found,) = pairs_in_case(*case(RIGHT, LEFT), [1, 2]).values()
    assert found.order == (0, 0, -1)


@pytest.mark.parametrize(("offset", "order"), [(0, 0), (1, 0), (2, 1), (-1, 0), (-2, -1)])
def test_offsets_below_half_a_standard_deviation_are_no_order(offset, order):
    # the standard deviation of 12 adjacent voxels is 12 / sqrt(12) = 3.46; offset 2 is 0.58 of it, offset 1 is 0.29
    first = box((0, 4), (4, 16), (0, 4))
    second = box((8, 12), (4 + offset, 16 + offset), (0, 4))
    (found,) = pairs_in_case(*case(first, second), [1, 2]).values()
    assert found.order == (1, order, 0)


def test_paired_organs_with_one_label_have_no_order_along_their_axis():
    image, segmentation = case(LEFT, box((2, 14), (13, 18), (5, 15)))
    segmentation[RIGHT] = 1
    (found,) = pairs_in_case(image, segmentation, [1, 2]).values()
    assert found.order == (0, 1, 0)


def test_overlap_is_one_minus_the_distance_of_the_distributions():
    image, segmentation = case(LEFT, RIGHT, means=(0.0, 1.0))
    (found,) = pairs_in_case(image, segmentation, [1, 2]).values()
    exact = ks_2samp(image[0][segmentation == 1], image[0][segmentation == 2]).statistic
    assert found.overlap == pytest.approx(1 - exact, abs=0.02)
    assert found.overlap == pytest.approx(0.617, abs=0.08)  # of two normal distributions, a standard deviation apart


def test_overlap_does_not_depend_on_the_scale_of_intensities():
    image, segmentation = case(LEFT, RIGHT, means=(0.0, 1.0))
    (found,) = pairs_in_case(image, segmentation, [1, 2]).values()
    (scaled,) = pairs_in_case(np.exp(image) * 1e6, segmentation, [1, 2]).values()
    assert scaled == found


def test_of_several_channels_that_counts_which_tells_the_classes_apart():
    alike, segmentation = case(LEFT, RIGHT)
    apart, _ = case(LEFT, RIGHT, means=(0.0, 10.0))
    (found,) = pairs_in_case(np.concatenate([alike, apart]), segmentation, [1, 2]).values()
    assert found.overlap == 0
    (found,) = pairs_in_case(alike, segmentation, [1, 2]).values()
    assert found.overlap > 0.8


def test_only_the_classes_that_are_there_make_pairs():
    image, segmentation = case(LEFT, RIGHT, box((14, 16), (0, 2), (0, 2)), box((0, 2), (0, 2), (0, 2)))
    segmentation[0, -1, -1] = -1  # nnU-Net's mark outside the nonzero region
    assert set(pairs_in_case(image, segmentation, [1, 2, 4, 5])) == {(1, 2), (1, 4), (2, 4)}
    assert pairs_in_case(image, np.zeros(SHAPE, np.int16), [1, 2]) == {}
    assert set(pairs_in_case(image, segmentation.astype(np.float32), [2, 3])) == {(2, 3)}


def test_single_voxels_and_flat_images():
    segmentation = np.zeros((1, 4, 5), np.int16)
    segmentation[0, 1, 0], segmentation[0, 1, 4] = 1, 2
    (found,) = pairs_in_case(np.ones((1, 1, 4, 5)), segmentation, [1, 2]).values()
    assert found == PairInCase(1.0, (0, 0, 1))


def test_counts_over_cases():
    units = [
        [{(1, 2): PairInCase(0.4, (1, -1, 0))}],
        [{(1, 2): PairInCase(0.6, (1, 1, 1)), (1, 3): PairInCase(0.1, (0, 0, -1))}],
        [{}],
    ]
    assert combine(units) == [
        {"labels": [1, 2], "overlap": 0.5, "votes": 2, "before": [2, 1, 1], "after": [0, 1, 0]},
        {"labels": [1, 3], "overlap": 0.1, "votes": 1, "before": [0, 0, 0], "after": [0, 0, 1]},
    ]


def test_scans_of_one_patient_have_one_vote():
    scans = [{(1, 2): PairInCase(0.6, (1, 1, 0))}, {(1, 2): PairInCase(0.8, (1, -1, 1))}, {}]
    (found,) = combine([scans])
    assert (found["votes"], found["overlap"]) == (1, 0.7)
    assert (found["before"], found["after"]) == ([1, 0, 0], [0, 0, 0])
