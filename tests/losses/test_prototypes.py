from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import normalize

from nnssl.losses.prototypes import masked_prototypes, paired_contrast, structure_contrast

E1, E2 = [1.0, 0.0], [0.0, 1.0]


def test_prototypes_are_means_of_length_1():
    features = torch.tensor([[[3.0, 1.0, 5.0, 0.0], [0.0, 1.0, 0.0, 7.0]]])
    masks = torch.tensor([[[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]], dtype=torch.bool)
    prototypes, present = masked_prototypes(features, masks)
    assert present.tolist() == [[True, True, False]]
    expected = [[4 / math.hypot(4, 1), 1 / math.hypot(4, 1)], [1, 0], [0, 0]]
    torch.testing.assert_close(prototypes, torch.tensor([expected]))


def test_probabilities_weigh_the_voxels_and_small_structures_are_absent():
    features = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]])
    masks = torch.tensor([[[0.9, 0.2, 0.1], [0.1, 0.8, 0.0]]])
    prototypes, present = masked_prototypes(features, masks, min_voxels=1)
    assert present.tolist() == [[True, False]]
    torch.testing.assert_close(prototypes[0, 0], normalize(torch.tensor([0.9, 0.3]), dim=0))
    assert prototypes[0, 1].tolist() == [0, 0]


def test_contrast_of_two_patches_by_hand():
    """Structure 0 agrees, structure 1 is orthogonal, and only the first patch shows structure 2."""
    prototypes = torch.tensor([[E1, E2, E1], [E1, E1, E2]])
    present = torch.tensor([[True, True, True], [True, True, False]])
    e = math.exp(1 / 0.5)
    # each anchor against the other four: which of them point its way
    shares = {
        (0, 0): e / (1 + 3 * e),  # E1 against E2, E1 (structure 2), E1 (its positive), E1
        (0, 1): 1 / 4,  # E2 against four E1
        (1, 0): e / (1 + 3 * e),
        (1, 1): 1 / (1 + 3 * e),
    }
    expected = -sum(math.log(share) for share in shares.values()) / 4
    assert structure_contrast(prototypes, present).item() == pytest.approx(expected, rel=1e-5)


def test_several_positives_are_averaged():
    prototypes = torch.tensor([[E1], [E1], [E2]])
    present = torch.ones(3, 1, dtype=torch.bool)
    e = math.exp(2)
    like, unlike = math.log(e / (e + 1)), math.log(1 / (e + 1))
    expected = -(2 * (like + unlike) / 2 + math.log(1 / 2)) / 3
    assert structure_contrast(prototypes, present).item() == pytest.approx(expected, rel=1e-5)


def test_contrast_falls_when_the_same_structures_become_alike():
    generator = torch.Generator().manual_seed(0)
    prototypes = normalize(torch.randn(2, 3, 8, generator=generator), dim=2)
    present = torch.ones(2, 3, dtype=torch.bool)
    alike = prototypes.clone()
    alike[1] = alike[0]
    assert structure_contrast(alike, present) < structure_contrast(prototypes, present)


@pytest.mark.parametrize("present", [[[True, False], [False, True]], [[False, False], [False, False]], [[True, True]]])
def test_without_a_positive_the_contrast_is_0_without_gradient(present):
    present = torch.tensor(present)
    features = torch.randn(*present.shape, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = structure_contrast(normalize(features, dim=2) * present[..., None], present)
    assert loss.item() == 0
    loss.backward()
    assert features.grad.isfinite().all()
    assert features.grad.abs().sum() == 0


def test_an_absent_prototype_receives_no_gradient():
    features = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    present = torch.tensor([[True, True], [True, False]])
    structure_contrast(normalize(features, dim=2), present).backward()
    assert features.grad[1, 1].abs().sum() == 0
    assert (features.grad[present].abs().sum(1) > 0).all()


def test_paired_contrast_by_hand():
    first, second = torch.tensor([E1, E2]), torch.tensor([E1, E2]) * 3
    e = math.exp(2)
    assert paired_contrast(first, second).item() == pytest.approx(-math.log(e / (e + 2)), rel=1e-5)
    assert paired_contrast(first[:1], second[:1]).item() == pytest.approx(0, abs=1e-6)
