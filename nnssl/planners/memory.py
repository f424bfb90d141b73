"""Memory of one semi-supervised training step, in units of nnU-Net's supervised step."""

from __future__ import annotations

TEACHER_SHARE = 0.25
"""Memory of a forward pass without gradient, relative to a student's forward and backward pass on the same patches."""


def step_memory_factor(unlabeled_per_labeled: float = 1.0) -> float:
    """Memory of a semi-supervised step divided by that of a supervised step with the same labeled batch.

    The student sees B_l labeled and B_u unlabeled patches with gradients, the teacher the B_u unlabeled ones without:
    (B_l + B_u + 0.25 B_u) / B_l.

    Args:
        unlabeled_per_labeled: B_u / B_l.

    >>> step_memory_factor()
    2.25
    """
    if unlabeled_per_labeled < 0:
        raise ValueError(f"unlabeled_per_labeled must not be negative, got {unlabeled_per_labeled}")
    return 1.0 + unlabeled_per_labeled * (1.0 + TEACHER_SHARE)
