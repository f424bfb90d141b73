from __future__ import annotations

import math

import pytest
import torch

from nnssl.losses.contrast import intersection_union_contrast, projected_cosine, projected_products
from nnssl.networks.features import affine_map


def contrast(similarity, first, second, **options):
    s = torch.as_tensor(similarity, dtype=torch.float32).view(1, 1, -1)
    masks = [torch.as_tensor(mask, dtype=torch.bool).view(1, 1, -1).expand_as(s) for mask in (first, second)]
    (loss,) = intersection_union_contrast(s, *masks, 0.1, **options)
    return loss.item()


@pytest.mark.parametrize(
    ("similarity", "seen", "expected"),
    [(0.0, 0, 2 * math.log(1001)), (1.0, 0, 16.9078 + 0.0444), (1.0, 1, 16.9078 + 0.0444)],
)
def test_agreement_everywhere(similarity, seen, expected):
    masks = [seen] * 1000
    assert contrast([similarity] * 1000, masks, masks) == pytest.approx(expected, abs=1e-3)


def test_both_terms_of_a_thousand_voxels():
    """Intersection and union terms one by one: the masks are exchanged where both see or neither does."""
    s = torch.ones(1, 1, 1000)
    nobody, everybody = torch.zeros(1, 1, 1000, dtype=torch.bool), torch.ones(1, 1, 1000, dtype=torch.bool)
    # where one network alone sees the structure, all voxels are negatives in both terms
    (alone,) = intersection_union_contrast(s, nobody, everybody, 0.1)
    assert alone.item() == pytest.approx(2 * 16.9078, abs=1e-3)


def test_four_voxels():
    value = contrast([0.5, -0.2, 0.9, 0.1], [1, 1, 0, 0], [1, 0, 1, 0])
    assert value == pytest.approx(7.7551 + 8.7685, abs=1e-3)


def test_gradients_at_agreement_and_disagreement():
    s = torch.tensor([[[0.5, -0.2, 0.9, 0.1]]], requires_grad=True)
    first, second = torch.tensor([[[1, 1, 0, 0]]]).bool(), torch.tensor([[[1, 0, 1, 0]]]).bool()
    intersection_union_contrast(s, first, second, 0.1).sum().backward()
    assert (s.grad[0, 0, 1:3] > 0).all(), "descent drives the embeddings apart"
    direct = torch.tensor([0.5, -0.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)
    total = 0.0
    for mask in (first & second, ~(first | second)):
        m = mask[0, 0].double()
        up, down = (m * direct / 0.1).exp(), ((1 - m) * direct / 0.1).exp().sum()
        total = total - (up / (up + down)).log().mean()
    total.backward()
    torch.testing.assert_close(s.grad[0, 0].double(), direct.grad, rtol=1e-4, atol=1e-5)


def test_structures_are_independent_and_others_voxels_enter_the_sum():
    torch.manual_seed(0)
    s = torch.rand(2, 1, 3, 4) * 2 - 1
    first, second = torch.rand(2, 2, 3, 4) > 0.5, torch.rand(2, 2, 3, 4) > 0.5
    both = intersection_union_contrast(s, first, second, 0.1)
    for structure in range(2):
        part = slice(structure, structure + 1)
        torch.testing.assert_close(both[part], intersection_union_contrast(s, first[:, part], second[:, part], 0.1))
    # halves that know the sum of each other have the mean of the whole
    sums: list[list[torch.Tensor]] = [[], []]
    for half in (0, 1):
        rows = slice(half, half + 1)
        intersection_union_contrast(
            s[rows], first[rows], second[rows], 0.1, lambda v, h=half: (sums[h].append(v), v[None])[1]
        )
    parts = []
    for half in (0, 1):
        rows, pairs = slice(half, half + 1), iter(zip(*sums, strict=True))
        parts.append(
            intersection_union_contrast(
                s[rows], first[rows], second[rows], 0.1, lambda _, p=pairs: torch.stack(next(p))
            )
        )
    torch.testing.assert_close((parts[0] + parts[1]) / 2, both)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_products_of_projections_and_their_gradients_are_those_of_the_projections(dimensions):
    convolution = {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[dimensions]
    torch.manual_seed(0)
    layers = convolution(3, 20, 1).double(), convolution(5, 20, 1).double()
    size = (4, 3, 2)[:dimensions]
    patches = [torch.randn(2, n, *size, dtype=torch.float64, requires_grad=True) for n in (3, 5)]
    products = projected_products(*patches, (affine_map(layers[0]), affine_map(layers[1])))
    direct = (layers[0](patches[0]) * layers[1](patches[1])).sum(1)
    torch.testing.assert_close(products, direct)
    weights = [*patches, *layers[0].parameters(), *layers[1].parameters()]
    seed = torch.randn_like(direct)
    found, expected = (torch.autograd.grad((value * seed).sum(), weights) for value in (products, direct))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_squared_lengths_of_projections():
    layer = torch.nn.Conv2d(2, 30, 1)
    images = torch.randn(3, 2, 5, 4)
    matrix = affine_map(layer)
    torch.testing.assert_close(projected_products(images, images, (matrix, matrix)), layer(images).square().sum(1))


def test_cosine_of_projections_is_bounded_where_one_vanishes():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(4, 16, 1), torch.nn.Conv2d(4, 16, 1)
    matrices = affine_map(layers[0]), affine_map(layers[1])
    images = [torch.randn(2, 4, 6, 5, requires_grad=True) for _ in layers]
    expected = torch.nn.functional.cosine_similarity(*(layer(x) for layer, x in zip(layers, images, strict=True)))
    torch.testing.assert_close(projected_cosine(*images, matrices), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        # W x + v is nothing but rounding
        layers[0].bias.copy_(-layers[0].weight.flatten(1).sum(1))
        images[0].copy_(1 + 1e-6 * torch.randn(2, 4, 6, 5))
    cosines = projected_cosine(*images, (affine_map(layers[0]), matrices[1]))
    assert (cosines.abs() <= 1).all()
    gradients = torch.autograd.grad(cosines.sum(), images)
    assert all(gradient.isfinite().all() and gradient.abs().max() < 1e3 for gradient in gradients)
