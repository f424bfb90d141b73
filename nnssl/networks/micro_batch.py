"""A network's pass over a batch in parts, in the memory of one part."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint


def in_parts(
    function: Callable[..., list[torch.Tensor]], images: torch.Tensor, size: int | None, *others: torch.Tensor
) -> list[torch.Tensor]:
    """``function(images, *others)``, computed for at most ``size`` images at a time.

    The result, and every gradient that flows through it, is that of one pass over the whole batch (to rounding), for
    any loss: the loss sees all outputs at once. Each part but the last keeps nothing but its input for the backward
    pass, which computes the part again when its turn comes (gradient checkpointing, Chen et al., 2016,
    arXiv:1604.06174, over samples instead of layers). The last part's turn comes first, so it keeps its activations.
    The price for n parts is (n - 1) / n of a forward pass.

    Args:
        function: maps images ``(n, C, *S)``, and the same samples of the others, to a list of tensors ``(n, ...)``,
            each sample on its own.
        images: ``(N, C, *S)``.
        size: largest number of images in a part; None for all.
        others: further tensors ``(N, ...)`` of the same samples.
    """
    if size is None or len(images) <= size:
        return function(images, *others)
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    *recomputed, kept = zip(*(tensor.split(size) for tensor in (images, *others)), strict=True)
    if torch.is_grad_enabled():
        outputs = [checkpoint(function, *part, use_reentrant=False) for part in recomputed]
    else:
        outputs = [function(*part) for part in recomputed]
    outputs.append(function(*kept))
    return [torch.cat(parts) for parts in zip(*outputs, strict=True)]
