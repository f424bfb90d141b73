"""Consistency losses between two predictions of the same voxels."""

from __future__ import annotations

import torch

# vectors of length 0 have no direction: their distance to any other is 1
_SMALLEST = 1e-16


def squared_difference(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared difference of two probability maps for every class and voxel.

    Args:
        student: probabilities ``(N, K, *S)`` that receive the gradient.
        teacher: probabilities ``(N, K, *S)``; no gradient flows into them.

    Returns:
        ``(N, K, *S)``.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"shapes differ: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    return (student - teacher.detach()).square()


def mean_squared_difference(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over batch, classes and voxels of the squared difference of two probability maps.

    The soft consistency of mean teacher methods (Tarvainen & Valpola, NIPS 2017, section 2; Yu et al., MICCAI 2019,
    equation 1).

    Args:
        student: probabilities ``(N, K, *S)`` that receive the gradient.
        teacher: probabilities ``(N, K, *S)``; no gradient flows into them.

    Returns:
        Scalar tensor in ``[0, 1]`` for probabilities.

    >>> mean_squared_difference(torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.5], [0.5]]]))
    tensor(0.2500)
    """
    return squared_difference(student, teacher).mean()


def cosine_distance(first: torch.Tensor, second: torch.Tensor, axis: int = 1) -> torch.Tensor:
    """1 - cosine of the vectors along ``axis``, 0 for equal directions to 2 for opposite ones; ``axis`` is dropped.

    >>> cosine_distance(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    tensor([1.])
    """
    # torch's own divides every vector by its norm first, which takes several times as long
    squares = first.square().sum(axis) * second.square().sum(axis)
    return 1 - cosine((first * second).sum(axis), squares)


def cosine(products: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Cosines of pairs of vectors, given their dot products and the products of their squared lengths; 0 for length 0.

    >>> cosine(torch.tensor([6.0, 0.0]), torch.tensor([36.0, 0.0]))
    tensor([1., 0.])
    """
    return products * squares.clamp_min(_SMALLEST).rsqrt()
