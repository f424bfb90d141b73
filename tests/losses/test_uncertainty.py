from __future__ import annotations

import math

import pytest
import torch

from nnssl.losses.uncertainty import (
    class_confidence,
    class_divergence,
    class_entropy,
    region_confidence,
    region_divergence,
    region_entropy,
)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_uniform_distribution_has_the_largest_entropy(classes):
    uniform = torch.full((1, classes, 2, 2), 1 / classes)
    torch.testing.assert_close(class_entropy(uniform), torch.full((1, 1, 2, 2), math.log(classes)))
    other = torch.rand((4, classes, 3), generator=torch.Generator().manual_seed(0)).softmax(1)
    assert class_entropy(other).max() < math.log(classes)


def test_certainty_has_no_entropy():
    certain = torch.tensor([[[0.0], [1.0], [0.0]]])
    assert class_entropy(certain).tolist() == [[[0.0]]]
    assert region_entropy(certain).tolist() == [[[0.0], [0.0], [0.0]]]


def test_known_value():
    p = torch.tensor([[[0.25], [0.75]]])
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert class_entropy(p).item() == pytest.approx(expected)
    assert region_entropy(p).flatten().tolist() == pytest.approx([expected, expected])


def test_regions_are_independent():
    p = torch.tensor([[[0.5], [1.0]]])
    assert region_entropy(p).flatten().tolist() == pytest.approx([math.log(2), 0])


def test_confidence_is_0_for_equal_probabilities_and_1_for_certain_ones():
    for classes in (2, 3, 7):
        equal = torch.full((1, classes, 4), 1 / classes)
        torch.testing.assert_close(class_confidence(equal), torch.zeros(1, 1, 4), atol=1e-6, rtol=0)
        assert (class_confidence(torch.eye(classes)[None]) == 1).all()
    regions = torch.tensor([[[0.5, 1.0, 0.75], [0.5, 0.0, 0.0]]])
    torch.testing.assert_close(region_confidence(regions), torch.tensor([[[0.0, 1.0, 0.75]]]))


def test_divergences():
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.2, 0.3, 0.5])
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close(class_divergence(p.log(), q.log() + 3), expected)
    two = class_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[-2.0, 0.0]]))
    torch.testing.assert_close(region_divergence(torch.tensor([[1.0]]), torch.tensor([[-2.0]])), two)
    assert region_divergence(p, p) == class_divergence(q, q) == 0
