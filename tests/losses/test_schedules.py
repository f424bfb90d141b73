from __future__ import annotations

import math

import pytest

from nnssl.losses.schedules import ema_decay_with_warmup, sigmoid_rampup


def test_rampup_published_values():
    # weight 0.1 of the mean teacher family: 0.000674 at the start, 0.1 at the end
    assert 0.1 * sigmoid_rampup(0.0) == pytest.approx(0.000674, abs=1e-6)
    assert 0.1 * sigmoid_rampup(1.0) == pytest.approx(0.1)
    assert sigmoid_rampup(0.5) == pytest.approx(math.exp(-1.25))


def test_rampup_rises_and_stays():
    values = [sigmoid_rampup(i / 20) for i in range(30)]
    assert values == sorted(values)
    assert values[20:] == [1.0] * 10


def test_rampup_refuses_negative_progress():
    with pytest.raises(ValueError, match="negative"):
        sigmoid_rampup(-0.1)


def test_decay_starts_as_copy_and_reaches_its_horizon():
    assert ema_decay_with_warmup(0, 0.99) == 0.0
    assert ema_decay_with_warmup(1, 0.99) == 0.5
    assert ema_decay_with_warmup(98, 0.99) == pytest.approx(1 - 1 / 99)
    assert ema_decay_with_warmup(99, 0.99) == 0.99
    assert ema_decay_with_warmup(10_000, 0.99) == 0.99
