"""Weights and rates as functions of training progress, so that a method keeps its shape under any budget."""

from __future__ import annotations

import math


def sigmoid_rampup(progress: float) -> float:
    """Weight that rises from exp(-5) = 0.0067 at progress 0 to 1 at progress 1 and stays there.

    ``exp(-5 (1 - p)^2)`` (Laine & Aila, ICLR 2017, section 3), the ramp of the mean teacher family. Published
    schedules end it with the training, hence progress is the share of the training that is done.

    >>> round(sigmoid_rampup(0.0), 4), sigmoid_rampup(1.0), sigmoid_rampup(1.5)
    (0.0067, 1.0, 1.0)
    """
    if progress < 0:
        raise ValueError(f"progress must not be negative, got {progress}")
    return math.exp(-5.0 * (1.0 - min(progress, 1.0)) ** 2)


def linear_rampup(progress: float, length: float) -> float:
    """Weight that rises linearly from 0 at progress 0 to 1 at progress ``length`` and stays there.

    >>> linear_rampup(0.0, 0.1), linear_rampup(0.05, 0.1), linear_rampup(0.5, 0.1), linear_rampup(0.0, 0.0)
    (0.0, 0.5, 1.0, 1.0)
    """
    if progress < 0 or length < 0:
        raise ValueError(f"progress and length must not be negative, got {progress} and {length}")
    return 1.0 if progress >= length else progress / length


def ema_decay_with_warmup(iteration: int, decay: float) -> float:
    """Decay of the weight average after student step ``iteration`` (0 for the first): ``min(1 - 1/(t+1), decay)``.

    Until the horizon of ``decay`` is reached the teacher is the plain mean of the students so far; after the first
    step it is a copy of the student (Tarvainen & Valpola, NIPS 2017, released code).

    >>> ema_decay_with_warmup(0, 0.99), ema_decay_with_warmup(1, 0.99), ema_decay_with_warmup(1000, 0.99)
    (0.0, 0.5, 0.99)
    """
    return min(1.0 - 1.0 / (iteration + 1), decay)
