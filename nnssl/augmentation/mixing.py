"""Which patches of two streams are mixed with each other."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Pairs(NamedTuple):
    """Pairs of a labeled and an unlabeled patch: their rows, and which of them lends the box, each ``(N,)``."""

    labeled: torch.Tensor
    unlabeled: torch.Tensor
    labeled_is_pasted: torch.Tensor


def pair_both_ways(
    labeled: int, unlabeled: int, rank: int = 0, ranks: int = 1, device: torch.device | None = None
) -> Pairs:
    """Pairs every patch of two streams, and takes the directions of pasting in turn.

    The larger stream is used once and the smaller one is repeated; an odd number of pairs is doubled, so that both
    directions are equally many. For equally many patches in both, the even rows are one half of the batch and the odd
    rows the other. Ranks that share a batch pair their own rows as one process would.

    Args:
        labeled: number of labeled patches of this rank.
        unlabeled: number of its unlabeled patches.
        rank: of this process.
        ranks: how many share the batch.
        device: of the result.

    >>> pair_both_ways(1, 2).unlabeled, pair_both_ways(1, 2).labeled_is_pasted
    (tensor([0, 1]), tensor([False,  True]))
    """
    if min(labeled, unlabeled) < 1:
        raise ValueError(f"both streams need a patch, got {labeled} labeled and {unlabeled} unlabeled ones")
    count = max(labeled, unlabeled)
    count *= 1 + count * ranks % 2
    rows = torch.arange(count, device=device)
    return Pairs(rows * labeled // count, rows * unlabeled // count, (rows + rank * count) % 2 == 1)


def partners(rows: torch.Tensor) -> torch.Tensor:
    """Exchanges every even row ``(N, ...)`` with the odd row after it, pairs of `pair_both_ways` of either direction.

    >>> partners(torch.arange(4))
    tensor([1, 0, 3, 2])
    """
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
