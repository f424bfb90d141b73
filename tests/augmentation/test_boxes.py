import math
import random

import pytest
import torch

from nnssl.augmentation.boxes import box_edges, random_boxes
from nnssl.losses.labels import resized_labels


@pytest.mark.parametrize(
    ("shape", "share", "edges"),
    [
        ((112, 112, 80), 2 / 3, (74, 74, 53)),
        ((96, 96, 96), 2 / 3, (64, 64, 64)),
        ((256, 256), 2 / 3, (170, 170)),
        ((10, 20), (0.5, 1), (5, 20)),
        ((2, 30), 0.1, (1, 3)),
    ],
)
def test_edges_are_a_share_of_the_patch(shape, share, edges):
    assert box_edges(shape, share) == edges


@pytest.mark.parametrize("share", [0, -0.5, 1.1, (0.5, 0)])
def test_shares_outside_the_patch_are_refused(share):
    with pytest.raises(ValueError, match="share"):
        box_edges((4, 4), share)


def test_boxes_have_their_edges_and_lie_anywhere_in_the_patch():
    random.seed(0)
    shape, edges = (5, 4), (3, 4)
    masks = random_boxes(200, shape, edges)
    assert masks.shape == (200, 1, *shape)
    assert masks.dtype == torch.bool
    assert masks.any(3).sum(2).flatten().unique().tolist() == [3]
    assert masks.any(2).sum(2).flatten().unique().tolist() == [4]
    starts = masks[:, 0, :, 0].float().argmax(1).bincount(minlength=3)
    assert starts.min() > 200 / 3 - 4 * math.sqrt(200 * 2 / 9)


def test_the_generator_decides_about_the_boxes():
    random.seed(0)
    first = random_boxes(3, (16, 16, 16), (8, 8, 8))
    assert not torch.equal(first, random_boxes(3, (16, 16, 16), (8, 8, 8)))
    random.seed(0)
    assert torch.equal(first, random_boxes(3, (16, 16, 16), (8, 8, 8)))


@pytest.mark.parametrize("edges", [(5, 5), (0, 2)])
def test_boxes_that_do_not_fit_are_refused(edges):
    with pytest.raises(ValueError, match="does not fit"):
        random_boxes(1, (4, 4), edges)


def test_masks_of_lower_resolutions_stay_masks():
    box = random_boxes(1, (16, 16, 16), (10, 10, 10))
    for mask, edge in zip(resized_labels(box, [(16,) * 3, (8,) * 3, (4,) * 3]), (16, 8, 4), strict=True):
        assert mask.shape == (1, 1, edge, edge, edge)
        assert mask.dtype == torch.bool
