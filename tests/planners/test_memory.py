from __future__ import annotations

import pytest

from nnssl.planners.memory import step_memory_factor


def test_equal_batches():
    assert step_memory_factor() == 2.25


@pytest.mark.parametrize(("ratio", "factor"), [(0, 1.0), (0.5, 1.625), (2, 3.5)])
def test_other_ratios(ratio, factor):
    assert step_memory_factor(ratio) == factor


def test_negative_ratio_is_refused():
    with pytest.raises(ValueError, match="-1"):
        step_memory_factor(-1)
