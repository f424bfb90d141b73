import numpy as np
import pytest
import torch
from scipy import ndimage

from nnssl.losses.components import largest_components, largest_region


def test_the_largest_component_of_every_class_and_patch_stays():
    labels = torch.zeros(2, 1, 8, 8, dtype=torch.int64)
    labels[0, 0, :2, :2] = 1
    labels[0, 0, 6:, 5:] = 1
    labels[0, 0, 4, 0] = 2
    labels[1, 0, 0, :3] = 1
    expected = labels.clone()
    expected[0, 0, :2, :2] = 0
    labels[1, 0, 7, 7] = 1
    cleaned = largest_components(labels)
    assert torch.equal(cleaned, expected)
    assert cleaned.dtype == labels.dtype


def test_corners_connect():
    labels = torch.eye(4, dtype=torch.int16)[None, None]
    assert torch.equal(largest_components(labels), labels)


def test_regions_are_cleaned_one_by_one():
    regions = torch.zeros(1, 2, 4, 4, 4, dtype=torch.bool)
    regions[0, 0, :2] = True
    regions[0, 0, 3, 3, 3] = True
    regions[0, 1, 3, 3, 3] = True
    cleaned = largest_components(regions)
    assert cleaned.dtype == torch.bool
    assert cleaned.sum((2, 3, 4)).tolist() == [[32, 1]]
    assert not cleaned[0, 0, 3, 3, 3]


def test_nothing_stays_nothing():
    assert not largest_components(torch.zeros(1, 1, 3, 3, dtype=torch.int64)).any()


def spiral(edge):
    """One path of a voxel's width to the middle."""
    mask = torch.zeros(edge, edge, dtype=torch.bool)
    row, column, (down, right) = 0, 0, (0, 1)
    mask[0, 0] = True

    def free(r, c):
        return 0 <= r < edge and 0 <= c < edge and not mask[r, c]

    def open_ahead(r, c):
        ahead = r + 2 * down, c + 2 * right
        return free(r + down, c + right) and not (all(0 <= n < edge for n in ahead) and mask[ahead])

    while True:
        for _ in range(2):
            if open_ahead(row, column):
                break
            down, right = right, -down
        else:
            return mask
        row, column = row + down, column + right
        mask[row, column] = True


def largest_by_label(mask):
    labeled, _ = ndimage.label(mask.numpy(), np.ones((3,) * mask.ndim))
    sizes = np.bincount(labeled.ravel())
    sizes[0] = 0
    return sizes.max(), labeled


@pytest.mark.parametrize("shape", [(48, 40), (12, 16, 14)])
def test_largest_region_is_a_component_of_the_largest_size(shape):
    generator = torch.Generator().manual_seed(0)
    for share in (0.05, 0.1, 0.3, 0.4, 0.45):
        masks = torch.rand((3, 1, *shape), generator=generator) < share
        regions = largest_region(masks)
        for mask, region in zip(masks[:, 0], regions[:, 0], strict=True):
            size, labeled = largest_by_label(mask)
            assert region.sum() == size
            assert len(np.unique(labeled[region.numpy()])) == 1
            assert (labeled[region.numpy()] > 0).all()


@pytest.mark.parametrize("turns", range(4))
def test_long_paths_are_followed_to_their_end(turns):
    mask = spiral(64).rot90(turns)
    assert mask.sum() > 2000
    assert largest_by_label(mask)[0] == mask.sum()
    assert torch.equal(largest_region(mask[None, None])[0, 0], mask)


def test_larger_region_of_two_and_one_of_two_equals():
    mask = torch.zeros(2, 1, 8, 8, dtype=torch.bool)
    mask[:, 0, 0, :3] = mask[0, 0, 4, :2] = mask[1, 0, 4, 2:5] = True
    regions = largest_region(mask)
    assert regions[0, 0].nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    assert regions[1, 0].nonzero().tolist() == [[4, 2], [4, 3], [4, 4]]
    assert torch.equal(largest_region(mask), regions)
    assert not largest_region(torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)).any()
