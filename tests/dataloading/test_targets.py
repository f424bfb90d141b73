from __future__ import annotations

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnssl.dataloading.rows import RowsLoader, count_uniform_rows
from nnssl.dataloading.targets import AppendTargets, split_targets
from tests.support.tiny import Tiny


def count(segmentation):
    return segmentation.sum().float()


def double(segmentation):
    return 2 * segmentation


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_targets_of_the_full_resolution_follow_the_segmentations(deep_supervision):
    data = {"image": torch.zeros(1, 4, 4), "segmentation": torch.arange(16, dtype=torch.int16).reshape(1, 4, 4)}
    full = data["segmentation"].clone()
    if deep_supervision:
        data = DownsampleSegForDSTransform([[1, 1], [0.5, 0.5]])(**data)
    heads = 2 if deep_supervision else 1
    segmentations = AppendTargets({"count": count, "double": double})(**data)["segmentation"]
    batch = {"target": segmentations}
    split_targets(batch, ["count", "double"])
    assert len(batch["target"]) == heads
    assert torch.equal(batch["target"][0], full)
    assert batch["extra"]["count"] == 120
    assert torch.equal(batch["extra"]["double"], 2 * full)


def test_a_batch_without_further_targets_stays_as_it_is():
    batch = {"target": torch.zeros(1)}
    split_targets(batch, [])
    assert batch == {"target": torch.zeros(1)}


@pytest.mark.parametrize(
    ("size", "share", "uniform"), [(1, 0.33, 1), (2, 0.33, 1), (4, 0.33, 3), (2, 0.0, 2), (2, 1.0, 0)]
)
def test_uniform_rows_are_those_that_the_loader_does_not_force(size, share, uniform, tmp_path, monkeypatch):
    data = Tiny().write(tmp_path, monkeypatch)
    cases = nnUNetDatasetBlosc2(str(data.base / data.identifier))
    labels = data.bare_trainer("Supervised").label_manager
    loader = RowsLoader(cases, size, data.patch, data.patch, labels, oversample_foreground_percent=share)
    forced = [loader._show_foreground(row) for row in range(size)]
    assert count_uniform_rows(size, share) == uniform
    assert forced == [False] * uniform + [True] * (size - uniform)
