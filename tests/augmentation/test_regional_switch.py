from __future__ import annotations

import numpy as np
import pytest
import torch

from nnssl.augmentation.regional_switch import RegionalSwitch, random_region, switch


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def patches():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 20, 24, 18)
    labels = torch.randint(-1, 5, (2, 1, 20, 24, 18), dtype=torch.int16)
    return images, labels


@pytest.mark.parametrize("seed", range(5))
def test_voxels_are_exchanged_and_none_is_lost(patches, seed):
    images, labels = patches
    region = random_region((20, 24, 18), (16, 16, 16), generator(seed))
    for pair in (images, labels):
        outputs = torch.stack(switch(*pair, region))
        for channel in range(pair.shape[1]):
            assert torch.equal(outputs[:, channel].flatten().sort()[0], pair[:, channel].flatten().sort()[0])
        assert torch.equal(outputs[..., ~region], pair[..., ~region])
        assert torch.equal(outputs[..., region], pair.flip(0)[..., region])
        assert outputs.dtype == pair.dtype


def test_image_and_label_are_switched_at_the_same_places(patches):
    images, labels = patches
    marked = torch.stack([torch.zeros_like(images[0]), torch.ones_like(images[1])])
    named = torch.stack([torch.zeros_like(labels[0]), torch.ones_like(labels[1])])
    region = random_region((20, 24, 18), (16, 16, 16), generator())
    for image, label in zip(switch(*marked, region), switch(*named, region), strict=True):
        assert torch.equal(image[:1], label.float())


def test_switching_twice_restores_and_an_empty_region_changes_nothing(patches):
    images, _ = patches
    region = random_region((20, 24, 18), (16, 16, 16), generator())
    again = switch(*switch(*images, region), region)
    assert torch.equal(torch.stack(again), images)
    nothing = switch(*images, torch.zeros_like(region))
    assert torch.equal(torch.stack(nothing), images)


def test_boxes_lie_in_the_central_part_and_have_the_edges_asked_for():
    longest = np.zeros(3, int)
    for seed in range(60):
        region = random_region((24, 22, 20), (20, 16, 12), generator(seed), boxes=(1, 1)).numpy()
        inside = np.argwhere(region)
        lower, upper = inside.min(0), inside.max(0) + 1
        assert region.sum() == np.prod(upper - lower)
        assert (lower >= [2, 3, 4]).all()
        assert (upper <= [22, 19, 16]).all()
        assert (upper - lower >= [5, 4, 3]).all()
        assert (upper - lower <= [10, 8, 6]).all()
        longest = np.maximum(longest, upper - lower)
    np.testing.assert_array_equal(longest, [10, 8, 6])


def test_every_place_of_the_central_part_is_reached():
    share = sum(random_region((12, 12), (8, 8), generator(seed)).float() for seed in range(300)) / 300
    assert (share[2:-2, 2:-2] > 0).all()
    share[2:-2, 2:-2] = 0
    assert share.sum() == 0


def test_one_to_three_boxes_are_drawn():
    one = [random_region((40, 40), (40, 40), generator(s), boxes=(1, 1)).sum() for s in range(100)]
    more = [random_region((40, 40), (40, 40), generator(s), boxes=(3, 3)).sum() for s in range(100)]
    usual = [random_region((40, 40), (40, 40), generator(s)).sum() for s in range(100)]
    assert sum(one) < sum(usual) < sum(more)


def test_axes_of_one_voxel_stay_whole():
    region = random_region((1, 16, 16), (1, 16, 16), generator(), boxes=(1, 1))
    assert region.any(1).any(1).all()


def test_a_central_part_larger_than_the_patch_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        random_region((8, 8), (8, 9), generator())


def test_the_share_of_switched_pairs_is_the_probability():
    source = generator()
    drawn = [RegionalSwitch(probability=0.5).draw((8, 8), (8, 8), source) is not None for _ in range(1000)]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.05)
    assert all(RegionalSwitch(1.0).draw((8, 8), (8, 8), source) is not None for _ in range(20))
    assert all(RegionalSwitch(0.0).draw((8, 8), (8, 8), source) is None for _ in range(20))
