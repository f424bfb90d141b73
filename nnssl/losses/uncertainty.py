"""How undecided probabilities are."""

from __future__ import annotations

import torch


def class_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of every voxel's distribution over classes, ``-sum_c p_c ln p_c`` with 0 ln 0 = 0.

    Args:
        probabilities: ``(N, K, *S)``, sum 1 over classes.

    Returns:
        ``(N, 1, *S)``, between 0 and ln K.

    >>> class_entropy(torch.tensor([[[0.5, 1.0], [0.5, 0.0]]]))
    tensor([[[0.6931, 0.0000]]])
    """
    return torch.special.entr(probabilities).sum(1, keepdim=True)


def region_entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of every region's yes or no, between 0 and ln 2; shape ``(N, R, *S)`` is kept."""
    return torch.special.entr(probabilities) + torch.special.entr(1 - probabilities)
