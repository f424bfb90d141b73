import torch

from nnssl.losses.components import largest_components


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
