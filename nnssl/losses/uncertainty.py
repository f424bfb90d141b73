"""How undecided probabilities are."""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid


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


def class_confidence(probabilities: torch.Tensor) -> torch.Tensor:
    """Probability of the most likely class, scaled such that it is 0 for equal probabilities, whatever their number.

    Args:
        probabilities: ``(N, K, *S)``, K at least 2, sum 1 over classes.

    Returns:
        ``(N, 1, *S)``, between 0 and 1.

    >>> class_confidence(torch.tensor([[[0.5, 1.0, 0.75], [0.5, 0.0, 0.25]]]))
    tensor([[[0.0000, 1.0000, 0.5000]]])
    """
    classes = probabilities.shape[1]
    return (probabilities.amax(1, keepdim=True) * classes - 1) / (classes - 1)


def region_confidence(probabilities: torch.Tensor) -> torch.Tensor:
    """Mean over regions ``(N, R, *S)`` of the distance from one half, scaled to [0, 1]; ``(N, 1, *S)``."""
    return (2 * probabilities - 1).abs().mean(1, keepdim=True)


def class_divergence(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of softmax distributions ``(..., K)`` from that of ``logits``; ``(...)``."""
    first, second = logits.log_softmax(-1), others.log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1)


def region_divergence(logits: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of independent regions, given as the logits ``(..., R)`` of each; ``(...)``."""
    yes, no = logsigmoid(logits), logsigmoid(-logits)
    return (yes.exp() * (yes - logsigmoid(others)) + no.exp() * (no - logsigmoid(-others))).sum(-1)
