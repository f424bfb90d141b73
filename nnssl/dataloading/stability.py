"""How much the segmentation of a case changed from one round of training to the next, and which cases to leave out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def changed_and_foreground(previous: np.ndarray, present: np.ndarray) -> tuple[int, int]:
    """Voxels whose label changed, and foreground voxels of the present segmentation.

    Args:
        previous: labels ``(*S)`` of the round before; 0 and below are background.
        present: labels ``(*S)`` of this round.
    """
    before, after = np.maximum(previous, 0), np.maximum(present, 0)
    return int(np.count_nonzero(before != after)), int(np.count_nonzero(after))


def instability(changed: int, foreground: int) -> float:
    """Changed voxels per foreground voxel (Huang et al., FLARE 2022); infinite if all of the foreground vanished."""
    if foreground == 0:
        return math.inf if changed else 0.0
    return changed / foreground


def worst_cases(scores: Mapping[str, float], share: float) -> list[str]:
    """The given share (rounded down) of the cases, those of the highest score; equal ones by name.

    Args:
        scores: of each case, such as its instability; the higher, the worse.
        share: 0 to below 1, so that at least one case remains.
    """
    # a share of 0.3 of 10 is 2.9999999999999996 in floating point
    number = math.floor(share * len(scores) + 1e-9)
    return sorted(scores, key=lambda case: (-scores[case], case))[:number]
