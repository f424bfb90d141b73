from __future__ import annotations

import numpy as np
import pytest

from nnssl.dataloading.correspondence import Frame
from nnssl.preprocessing.class_places import (
    GRID,
    MOST_CASES,
    WHOLE,
    Overlap,
    class_grid,
    compared_pairs,
    foreground_box,
    mean_overlap,
    most_typical,
)

IDENTITY = Frame.of_box(WHOLE)


def boxes(shape=(24, 24, 24), **places) -> np.ndarray:
    """Label 1 in the box ``a``, 2 in ``b``; a box is (lower, upper) along all axes."""
    segmentation = np.zeros(shape, np.int16)
    for label, place in ((1, places.get("a")), (2, places.get("b"))):
        if place is not None:
            segmentation[tuple(slice(*place) for _ in shape)] = label
    return segmentation


def overlap(first: np.ndarray, second: np.ndarray, kind: str = "relative", labels=(1, 2)) -> Overlap:
    grids = []
    for segmentation in (first, second):
        box = foreground_box(segmentation, labels)
        grids.append(class_grid(segmentation, labels, IDENTITY if kind == "relative" else Frame.of_box(box)))
    return mean_overlap([(grids[0], grids[1])])


def test_grids_show_the_class_at_relative_positions():
    grid = class_grid(boxes((12, 24, 48), a=(6, 12)), [1], IDENTITY)
    assert grid.shape == (GRID,) * 3
    expected = np.zeros_like(grid)
    expected[GRID // 2 :, GRID // 4 : GRID // 2, GRID // 8 : GRID // 4] = 1
    np.testing.assert_array_equal(grid, expected)


def test_places_outside_of_the_case_are_background():
    grid = class_grid(np.ones((8, 8, 8), np.int16), [1], Frame.of_box([(-1.0, 1.0)] * 3))
    assert grid.mean() == 1 / 8
    assert grid[-1, -1, -1] == 1


def test_other_labels_are_left_out():
    segmentation = boxes(a=(0, 12), b=(12, 24))
    assert class_grid(segmentation, [2], IDENTITY).mean() == 1 / 8
    assert foreground_box(segmentation, [2]) == [[0.5, 1.0]] * 3


def test_the_box_of_a_case_without_foreground_is_all_of_it():
    assert foreground_box(boxes(), [1]) == WHOLE


def test_equal_cases_overlap_fully_whatever_their_size():
    found = overlap(boxes(a=(4, 8), b=(8, 16)), boxes((48, 48, 48), a=(8, 16), b=(16, 32)))
    assert found.dice == 1
    assert found.beyond_chance == 1


def test_dice_and_chance_of_half_overlapping_boxes():
    first, second = np.zeros((2, 24, 24, 24), np.int16)
    first[:12], second[6:18] = 1, 1
    found = overlap(first, second, labels=(1,))
    assert found.dice == pytest.approx(0.5)
    assert found.chance == pytest.approx(0.5)
    assert found.beyond_chance == pytest.approx(0)


def test_boxes_bring_shifted_classes_together():
    first, second = boxes(a=(2, 6), b=(6, 10)), boxes(a=(12, 16), b=(16, 20))
    assert overlap(first, second).beyond_chance < 0.01
    assert overlap(first, second, "bbox").dice == 1


def test_scattered_classes_overlap_by_chance():
    rng = np.random.default_rng(0)
    first, second = (rng.uniform(size=(2, 48, 48, 48)) < 0.2).astype(np.int16)
    found = overlap(first, second)
    assert found.dice == pytest.approx(0.2, abs=0.01)
    assert found.beyond_chance == pytest.approx(0, abs=0.01)


def test_a_class_of_one_case_counts_and_one_of_none_does_not():
    with_both, with_one = boxes(a=(4, 8), b=(8, 16)), boxes(a=(4, 8))
    assert overlap(with_both, with_one).dice == 0.5
    assert overlap(with_one, with_one).dice == 1
    assert overlap(boxes(), boxes()) == Overlap(0.0, 0.0)
    assert mean_overlap([]) == Overlap(0.0, 0.0)


def test_pairs_are_of_different_patients_and_not_too_many():
    assert compared_pairs([["a1", "a2"], ["b1", "b2"], ["c1"]]) == [("a1", "b1"), ("a1", "c1"), ("b1", "c1")]
    assert compared_pairs([["a1", "a2"]]) == [("a1", "a2")]
    assert compared_pairs([["a1"]]) == []
    many = compared_pairs([[f"case_{i:03d}"] for i in range(100)])
    assert len(many) == MOST_CASES * (MOST_CASES - 1) // 2
    assert {"case_000", "case_099"} <= {case for pair in many for case in pair}


def test_the_typical_case_overlaps_the_others_best():
    cases = {name: class_grid(boxes(a=place), [1], IDENTITY) for name, place in
             (("low", (2, 12)), ("middle", (5, 15)), ("high", (8, 18)))}  # fmt: skip
    assert most_typical(cases, compared_pairs([[name] for name in cases])) == "middle"


def test_stray_voxels_do_not_move_the_box_and_small_classes_do():
    labels = np.zeros((1, 12, 10), np.int8)
    labels[0, 2:6, 3:8] = 1
    labels[0, 6, 8] = 2  # a class of one voxel, and
    labels[0, 11, 0] = 1  # as much of a large one, far below a tenth of it
    assert foreground_box(labels, [1, 2]) == [[0, 1], [2 / 12, 7 / 12], [0.3, 0.9]]
    assert foreground_box(labels, [2]) == [[0, 1], [6 / 12, 7 / 12], [0.8, 0.9]]
    # two voxels are a tenth of twenty; they touch the corner of each other
    labels[0, 10, 1] = 1
    assert foreground_box(labels, [1]) == [[0, 1], [2 / 12, 1], [0, 0.8]]
