"""How much the reconstruction of a voxel weighs: more where the segmentation is not good yet."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import avg_pool2d, avg_pool3d


def overlap_counts(
    predicted: torch.Tensor, reference: torch.Tensor, annotated: torch.Tensor | None = None, classes: int | None = None
) -> torch.Tensor:
    """What Dice is computed from, pooled over the batch, in float32.

    One class is counted after the other, so that no mask of all classes is held.

    Args:
        predicted: class numbers ``(N, 1, *S)``, or regions ``(N, K, *S)`` as booleans.
        reference: of the same form.
        annotated: ``(N, 1, *S)`` boolean; voxels that are not are left out. None: all are.
        classes: number of classes, background included; None for regions.

    Returns:
        ``(2, K)``: voxels where both agree on a class, and voxels of the class in either, those of both counted twice;
        followed by a row, ``(3, K)`` in all, of voxels of the class in the reference.
    """
    if annotated is None:
        annotated = torch.ones_like(predicted[:, :1], dtype=torch.bool)
    counts = []
    for k in range(reference.shape[1] if classes is None else classes):
        found = predicted[:, k : k + 1].bool() if classes is None else predicted == k
        true = (reference[:, k : k + 1].bool() if classes is None else reference == k) & annotated
        found = found & annotated
        inside = true.sum()
        counts.append(torch.stack([(found & true).sum(), found.sum() + inside, inside]))
    return torch.stack(counts, 1).float()


class RunningDice(nn.Module):
    """Dice of every class so far: ``D <- momentum D + (1 - momentum) Dice(batch)``, from 0 on.

    Only classes that the reference of a batch shows are updated. It is kept in a buffer ``dice`` ``(K,)``, float32.

    Args:
        classes: K, background included; for region labels the number of regions.
        momentum: 0 to 1.
    """

    dice: torch.Tensor

    def __init__(self, classes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("dice", torch.zeros(classes))

    @torch.no_grad()
    def update(self, counts: torch.Tensor) -> None:
        """Takes in a batch, given as `overlap_counts` of all of its patches, or any multiple of them."""
        agreeing, both, inside = counts
        batch = 2 * agreeing / both.clamp_min(torch.finfo(both.dtype).tiny)
        self.dice.copy_(torch.where(inside > 0, torch.lerp(batch, self.dice, self.momentum), self.dice))


def class_weights(labels: torch.Tensor, dice: torch.Tensor, alpha: float) -> torch.Tensor:
    """``1 + alpha (1 - D_c)`` where ``c`` is the class of the voxel.

    Args:
        labels: class numbers ``(N, 1, *S)``.
        dice: ``(K,)``.
        alpha: at least 0.

    Returns:
        ``(N, 1, *S)``.

    >>> class_weights(torch.tensor([[[0, 1]]]), torch.tensor([1.0, 0.25]), 2.0)
    tensor([[[1.0000, 2.5000]]])
    """
    weights = 1 + alpha * (1 - dice)
    return weights.index_select(0, labels.flatten().long()).view(labels.shape)


def region_weights(regions: torch.Tensor, dice: torch.Tensor, alpha: float) -> torch.Tensor:
    """``1 + alpha (1 - D_r)`` for the worst region ``r`` that holds the voxel, 1 outside of all regions.

    Args:
        regions: ``(N, R, *S)``, boolean or 0 and 1.
        dice: ``(R,)``.
        alpha: at least 0.

    Returns:
        ``(N, 1, *S)``.
    """
    missing = (1 - dice).view(1, -1, *[1] * (regions.ndim - 2))
    return 1 + alpha * (regions.to(dice.dtype) * missing).amax(1, keepdim=True)


@torch.no_grad()
def block_weights(predicted: torch.Tensor, reference: torch.Tensor, alpha: float, edge: int = 16) -> torch.Tensor:
    """``1 + alpha (1 - D_b)`` where ``D_b`` is the Dice in the block of the voxel.

    The patch is divided into blocks of ``edge`` voxels along each axis, from its first voxel on; those at its end may
    be smaller. Dice is the mean over the classes that reference or prediction show in a block, background included.

    Args:
        predicted: masks ``(N, K, *S)`` of all classes (or regions), boolean or 0 and 1, with 2 or 3 axes of space.
        reference: masks of the same shape.
        alpha: at least 0.
        edge: voxels.

    Returns:
        ``(N, 1, *S)``.
    """
    pool = {4: avg_pool2d, 5: avg_pool3d}[predicted.ndim]
    window = [min(edge, n) for n in predicted.shape[2:]]

    def share(masks: torch.Tensor) -> torch.Tensor:
        return pool(masks.float(), window, ceil_mode=True)

    both = share(predicted) + share(reference)
    dice = 2 * share(predicted.bool() & reference.bool()) / both.clamp_min(1e-12)
    shown = both > 0
    # a block outside of all regions shows none, and cannot be wrong
    missing = ((1 - dice) * shown).sum(1, keepdim=True) / shown.sum(1, keepdim=True).clamp_min(1)
    blown_up = missing
    for axis, size in enumerate(window, 2):
        blown_up = blown_up.repeat_interleave(size, axis).narrow(axis, 0, predicted.shape[axis])
    return 1 + alpha * blown_up
