"""nnU-Net's loss over a batch that several ranks share."""

from __future__ import annotations

from typing import Any

import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch import nn

from nnssl.trainers.engine.distributed import Ranks


def dice_and_cross_entropy(loss: nn.Module) -> Any:
    """nnU-Net's loss of one head, below deep supervision and what ranks share."""
    found: Any = loss
    while not hasattr(found, "dc"):
        found = found.loss
    return found


def share_loss(loss: nn.Module, ranks: Ranks, ignore_label: int | None) -> nn.Module:
    """``loss`` such that the mean of its gradients over the ranks is the gradient of the global batch.

    Means over patches of equal size need nothing. Batch Dice is computed from the sums of all ranks (nnU-Net's own
    ``ddp``). With an ignore label the cross entropy is a mean over the annotated voxels, of which ranks have more or
    less, see `SharedCrossEntropy`.

    Args:
        loss: nnU-Net's Dice and cross entropy, with or without deep supervision.
        ranks: those that share the batch.
        ignore_label: nnU-Net's number of it, or None.
    """
    if ranks.size == 1:
        return loss
    inner = dice_and_cross_entropy(loss)
    getattr(inner.dc, "_orig_mod", inner.dc).ddp = True
    if ignore_label is None:
        return loss
    shared = SharedCrossEntropy(inner, ranks)
    if not isinstance(loss, DeepSupervisionWrapper):
        return shared
    loss.loss = shared
    return loss


class SharedCrossEntropy(nn.Module):
    """nnU-Net's loss with an ignore label, in which every annotated voxel of the global batch weighs the same.

    The cross entropy of a rank is weighted by its annotated voxels over the mean of the ranks.
    """

    def __init__(self, loss: Any, ranks: Ranks):
        super().__init__()
        self.loss = loss
        self.weight = loss.weight_ce
        self.ranks = ranks
        self.regions = isinstance(loss, DC_and_BCE_loss)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, K, *S)`` and nnU-Net's target ``(B, 1, *S)``, or ``(B, regions + 1, *S)`` with regions."""
        voxels = self._annotated(target).sum().float()
        self.loss.weight_ce = self.weight * voxels / self.ranks.mean(voxels).clamp_min(1e-8)
        return self.loss(logits, target)

    def _annotated(self, target: torch.Tensor) -> torch.Tensor:
        if self.regions:  # the last channel marks what is ignored
            return target[:, -1] == 0
        return target != self.loss.ignore_label
