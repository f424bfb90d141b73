import math

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

from nnssl.losses.labels import (
    class_cross_entropy,
    most_likely_classes,
    most_likely_regions,
    region_cross_entropy,
    resized_labels,
)


def test_hard_labels_are_the_largest_logits_and_pass_no_gradient():
    logits = torch.tensor([[[0.1, 2.0], [0.5, -1.0], [0.4, 0.0]]], requires_grad=True)
    classes, regions = most_likely_classes(logits), most_likely_regions(logits)
    assert classes.tolist() == [[[1, 0]]]
    assert regions.tolist() == [[[True, True], [True, False], [True, False]]]
    assert not classes.requires_grad
    assert not regions.requires_grad


def test_cross_entropy_of_classes_is_minus_the_log_of_the_softmax():
    logits = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (2, 1, 4, 5), generator=torch.Generator().manual_seed(1)).to(torch.int16)
    expected = -logits.softmax(1).gather(1, labels.long()).log()
    torch.testing.assert_close(class_cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_cross_entropy_of_regions_is_the_mean_of_binary_ones(dtype):
    logits = torch.tensor([[[0.0], [math.log(3)]]])
    labels = torch.tensor([[[1], [0]]]).to(dtype)
    # probabilities 1/2 and 3/4
    expected = (math.log(2) + math.log(4)) / 2
    assert region_cross_entropy(logits, labels).item() == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int16, torch.int64])
def test_labels_are_resized_as_nnunet_resizes_references(dtype):
    labels = torch.randint(2, (2, 3, 12, 9, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    scales = [[1, 1, 1], [0.5, 0.5, 0.5], [0.25, 0.5, 1]]
    expected = DownsampleSegForDSTransform(scales)._apply_to_segmentation(labels[0])
    resized = resized_labels(labels, [head.shape[1:] for head in expected])
    for ours, theirs in zip(resized, expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours[0], theirs)
    assert resized[0] is labels
