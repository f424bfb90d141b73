"""A network's pass over a batch in parts, in the memory of one part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def in_parts(
    function: Callable[[torch.Tensor], list[torch.Tensor]], images: torch.Tensor, size: int | None
) -> list[torch.Tensor]:
    """``function(images)``, computed for at most ``size`` images at a time.

    The result, and every gradient that flows through it, is that of one pass over the whole batch (to rounding), for
    any loss: the loss sees all outputs at once. Each part but the last keeps nothing but its input for the backward
    pass, which computes the part again when its turn comes (gradient checkpointing, Chen et al., 2016,
    arXiv:1604.06174, over samples instead of layers). The last part's turn comes first, so it keeps its activations.
    The price for n parts is (n - 1) / n of a forward pass.

    Args:
        function: maps images ``(n, C, *S)`` to a list of tensors ``(n, ...)``, each sample on its own.
        images: ``(N, C, *S)``.
        size: largest number of images in a part; None for all.
    """
    if size is None or len(images) <= size:
        return function(images)
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    *recomputed, kept = images.split(size)
    if torch.is_grad_enabled():
        outputs = [checkpoint(function, part, use_reentrant=False) for part in recomputed]
    else:
        outputs = [function(part) for part in recomputed]
    outputs.append(function(kept))
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]
