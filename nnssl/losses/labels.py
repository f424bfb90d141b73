"""Hard labels and their cross entropy, for classes (softmax) and for overlapping regions (sigmoid)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate


def most_likely_classes(logits: torch.Tensor) -> torch.Tensor:
    """``(N, K, *S)`` to class numbers ``(N, 1, *S)``, without gradient."""
    # the indices of argmax, which takes ten times as long across channels on a CPU
    return logits.detach().max(1, keepdim=True).indices


def most_likely_regions(logits: torch.Tensor) -> torch.Tensor:
    """``(N, R, *S)`` to ``(N, R, *S)`` boolean: where the sigmoid exceeds one half; without gradient."""
    return logits.detach() > 0


def class_masks(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Class numbers ``(N, 1, *S)`` of any number format to masks ``(N, classes, *S)``, boolean.

    >>> class_masks(torch.tensor([[[1, 0]]]), 2)
    tensor([[[False,  True],
             [ True, False]]])
    """
    return labels == torch.arange(classes, device=labels.device).view(1, -1, *[1] * (labels.ndim - 2))


def class_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every voxel.

    Args:
        logits: ``(N, K, *S)``.
        labels: class numbers ``(N, 1, *S)`` of any number format.

    Returns:
        ``(N, 1, *S)``.

    >>> class_cross_entropy(torch.zeros(1, 2, 1), torch.ones(1, 1, 1))
    tensor([[[0.6931]]])
    """
    return cross_entropy(logits, labels[:, 0].long(), reduction="none")[:, None]


class WeightedCrossEntropy(nn.Module):
    """Mean over voxels of weighted negative log-likelihoods; the weights are of classes ``(K,)``, None for equal ones.

    The mean is over the number of voxels, not over their weights (as in PyTorch), so that patches of equal size weigh
    the same, and the mean over parts of a batch is that over the batch. Voxels of class ``ignore_index`` do not count.
    CUDA has no deterministic kernel for a cross entropy that sums; this one sums afterwards.

    >>> WeightedCrossEntropy(torch.tensor([1.0, 3.0]))(torch.zeros(1, 2, 2), torch.tensor([[0, 1]]))
    tensor(1.3863)
    """

    weight: torch.Tensor | None

    def __init__(self, weight: torch.Tensor | None = None, ignore_index: int = -100):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, K, *S)`` and class numbers ``(N, *S)`` of any number format; 0 if no voxel counts."""
        labels = labels.long()
        each = cross_entropy(logits, labels, self.weight, ignore_index=self.ignore_index, reduction="none")
        return each.sum() / (labels != self.ignore_index).sum().clamp_min(1)


def region_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every voxel, mean over the regions.

    Args:
        logits: ``(N, R, *S)``.
        labels: ``(N, R, *S)``, boolean or 0 and 1.

    Returns:
        ``(N, 1, *S)``.
    """
    return binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(1, keepdim=True)


def resized_labels(labels: torch.Tensor, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Labels ``(N, C, *S)`` for heads of lower resolution, resized as nnU-Net resizes its references.

    Args:
        labels: of the full resolution, boolean or numbers.
        shapes: spatial shape of each head.

    Returns:
        One tensor ``(N, C, *shape)`` per shape, in the number format of ``labels``.
    """
    full = labels.shape[2:]
    as_float = labels.float() if any(tuple(shape) != tuple(full) for shape in shapes) else labels
    return [
        labels
        if tuple(shape) == tuple(full)
        else interpolate(as_float, tuple(shape), mode="nearest-exact").to(labels.dtype)
        for shape in shapes
    ]
