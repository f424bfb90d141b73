from __future__ import annotations

import pytest
import torch

from nnssl.losses.labels import class_masks
from nnssl.losses.reconstruction import RunningDice, block_weights, class_weights, overlap_counts, region_weights


def test_counts_of_classes():
    reference = torch.tensor([[[0, 1, 1, 2]]])
    predicted = torch.tensor([[[0, 1, 2, 2]]])
    expected = [[1, 1, 1], [2, 3, 3], [1, 2, 1]]
    assert overlap_counts(predicted, reference, classes=3).tolist() == expected
    twice = overlap_counts(torch.cat([predicted] * 2), torch.cat([reference] * 2), classes=3)
    assert twice.tolist() == [[2 * n for n in row] for row in expected]


def test_counts_of_regions_and_voxels_that_are_not_annotated():
    reference = torch.tensor([[[1, 1, 0, 1], [0, 1, 0, 1]]])
    predicted = torch.tensor([[[1, 0, 1, 1], [0, 1, 0, 1]]], dtype=torch.bool)
    annotated = torch.tensor([[[True, True, True, False]]])
    assert overlap_counts(predicted, reference, annotated).tolist() == [[1, 1], [4, 2], [2, 1]]


def test_running_dice_follows_classes_that_are_shown():
    running = RunningDice(3)
    counts = torch.tensor([[1.0, 2.0, 0.0], [2.0, 8.0, 5.0], [1.0, 3.0, 0.0]])
    running.update(counts)
    assert running.dice.tolist() == pytest.approx([0.1, 0.05, 0.0])
    running.update(7 * counts)
    assert running.dice.tolist() == pytest.approx([0.19, 0.095, 0.0])
    assert "dice" in running.state_dict()


def test_a_class_that_is_missed_entirely_has_dice_0():
    running = RunningDice(1)
    running.dice.fill_(0.5)
    running.update(torch.tensor([[0.0], [4.0], [4.0]]))
    assert running.dice.item() == pytest.approx(0.45)


def test_weights_are_1_without_alpha_and_alike_for_equal_dice():
    labels = torch.randint(0, 3, (2, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(class_weights(labels, torch.rand(3), 0.0), torch.ones(2, 1, 4, 4))
    assert class_weights(labels, torch.full((3,), 0.3), 1.0).unique().numel() == 1


def test_lower_dice_raises_the_weight_of_that_class_only():
    labels = torch.tensor([[[0, 1, 2]]])
    before = class_weights(labels, torch.tensor([0.9, 0.8, 0.7]), 1.0)
    after = class_weights(labels, torch.tensor([0.9, 0.2, 0.7]), 1.0)
    torch.testing.assert_close(after - before, torch.tensor([[[0.0, 0.6, 0.0]]]))


def test_a_voxel_weighs_as_its_worst_region():
    regions = torch.tensor([[[1, 1, 0], [0, 1, 0]]])
    weights = region_weights(regions, torch.tensor([0.75, 0.5]), 2.0)
    assert weights.tolist() == [[[1.5, 2.0, 1.0]]]


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5)])
def test_weights_of_blocks(shape):
    reference = torch.zeros(1, 1, *shape)
    predicted = reference.clone()
    reference[0, 0, :2, :4] = 1  # the upper left block of 4 voxels is missed by half, the other blocks are right
    predicted[0, 0, :2, :2] = 1
    weights = block_weights(class_masks(predicted, 2), class_masks(reference, 2), 3.0, edge=4)
    # per slice 16 voxels: class 1 has 4 of 8, class 0 has 8 of 8 and 4 too many
    dice = (2 * 4 / 12 + 2 * 8 / 20) / 2
    assert weights.shape == (1, 1, *shape)
    assert weights[0, 0, :, :4].flatten().tolist() == pytest.approx([1 + 3 * (1 - dice)] * weights[0, 0, :, :4].numel())
    assert (weights[0, 0, :, 4:] == 1).all()


def test_a_block_outside_of_all_regions_is_not_wrong():
    nothing = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    assert (block_weights(nothing, nothing, 1.0) == 1).all()
