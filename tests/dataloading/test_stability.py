from __future__ import annotations

import math

import numpy as np
import pytest

from nnssl.dataloading.stability import changed_and_foreground, instability, worst_cases


def test_changed_voxels_are_those_with_another_label():
    previous = np.array([[0, 1, 1, 2], [0, 0, 2, 2]])
    present = np.array([[0, 1, 2, 2], [1, 0, 2, 0]])
    assert changed_and_foreground(previous, present) == (3, 5)


def test_the_outside_of_an_image_is_background():
    assert changed_and_foreground(np.array([-1, 0, -1, 1]), np.array([0, -1, 1, 1])) == (1, 2)


@pytest.mark.parametrize(
    ("changed", "foreground", "expected"), [(0, 7, 0.0), (3, 6, 0.5), (9, 6, 1.5), (0, 0, 0.0), (4, 0, math.inf)]
)
def test_instability(changed, foreground, expected):
    assert instability(changed, foreground) == expected


def test_the_share_of_the_highest_scores_is_left_out():
    scores = {"a": 0.1, "b": math.inf, "c": 0.5, "d": 0.2, "e": 0.5}
    assert worst_cases(scores, 0.0) == []
    assert worst_cases(scores, 0.2) == ["b"]
    assert worst_cases(scores, 0.59) == ["b", "c"]
    assert worst_cases(scores, 0.99) == ["b", "c", "e", "d"]
    assert worst_cases({}, 0.5) == []


def test_a_share_is_rounded_down_as_in_decimal_numbers():
    assert len(worst_cases({str(i): float(i) for i in range(100)}, 0.29)) == 29
    assert len(worst_cases({str(i): float(i) for i in range(2000)}, 0.038)) == 76
