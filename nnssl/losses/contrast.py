"""Contrast between the embeddings that two networks give the same voxels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from nnssl.losses.consistency import cosine


def projected_products(
    first: torch.Tensor, second: torch.Tensor, projections: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Dot product, voxel by voxel, of two projections to many channels, of which neither is computed.

    ``(W a + v) . (X b + y) = [a; 1]' G [b; 1]`` with ``G = [W v]' [X y]``, which has the few channels of a and b only.

    Args:
        first: a, ``(N, A, *S)``.
        second: b, ``(N, B, *S)``.
        projections: ``[W v]`` of shape ``(E, A + 1)`` and ``[X y]`` of shape ``(E, B + 1)``.

    Returns:
        ``(N, *S)``.
    """
    gram = projections[0].T @ projections[1]
    a, b = first.movedim(1, -1), second.movedim(1, -1)
    mapped = torch.nn.functional.linear(a, gram[:-1].T, gram[-1])
    return (mapped[..., :-1] * b).sum(-1) + mapped[..., -1]


def projected_cosine(
    first: torch.Tensor, second: torch.Tensor, projections: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Cosine, voxel by voxel, of two projections; arguments and shape as of `projected_products`.

    Projections that are shorter than rounding can tell count with the length that it can.
    """
    squares = _projected_squares(first, projections[0]) * _projected_squares(second, projections[1])
    return cosine(projected_products(first, second, projections), squares).clamp(-1, 1)


def _projected_squares(vectors: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    squares = projected_products(vectors, vectors, (projection, projection))
    largest = projection.detach().square().sum() * (vectors.detach().square().sum(1) + 1)
    return squares.maximum(torch.finfo(squares.dtype).eps * largest)


def intersection_union_contrast(
    similarity: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    temperature: float,
    gather: Callable[[torch.Tensor], torch.Tensor] = lambda value: value[None],
) -> torch.Tensor:
    """Attracts embeddings where both networks agree and repels them where they do not, for every structure.

    He et al., ICME 2025 (arXiv:2506.07368), as released. With I where both see the structure and U where any does::

        L = contrast(s, I) + contrast(s, 1 - U)
        contrast(s, M) = mean_n -ln(exp(M_n s_n / t) / (exp(M_n s_n / t) + sum_m exp((1 - M_m) s_m / t)))

    A voxel that M leaves out stays in mean and sum, with exp(0). Where one network alone sees the structure, the voxel
    is a negative in both terms.

    Args:
        similarity: cosines s of the two embeddings of each voxel ``(N, 1, *S)``, in float32.
        first: where a network sees each structure, boolean ``(N, C, *S)``.
        second: the same of the other network.
        temperature: t.
        gather: stacks a scalar with that of others, over whose voxels sums go, too.

    Returns:
        One loss per structure ``(C,)``; the means are over the voxels given here.
    """
    scaled = similarity / temperature
    losses = []
    for structure in range(first.shape[1]):
        one, other = (masks[:, structure, None] for masks in (first, second))
        terms = []
        for chosen in (one & other, ~(one | other)):
            negatives = gather(_recomputed(_log_sum_of_others, scaled, chosen)).logsumexp(0)
            terms.append(_recomputed(_mean_loss, scaled, chosen, negatives))
        losses.append(terms[0] + terms[1])
    return torch.stack(losses)


def _log_sum_of_others(scaled: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    return torch.where(chosen, 0.0, scaled).flatten().logsumexp(0)


def _mean_loss(scaled: torch.Tensor, chosen: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    return softplus(negatives - torch.where(chosen, scaled, 0.0)).mean()


def _recomputed(function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    # else every structure would keep several tensors of the size of the patches
    return checkpoint(function, *tensors, use_reentrant=False)
