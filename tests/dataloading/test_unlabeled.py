from __future__ import annotations

import blosc2
import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform

from nnssl.dataloading.cases import NamedErrors, UnlabeledCases, unlabeled_identifiers
from nnssl.dataloading.unlabeled import UnlabeledLoader


class Labels:
    """The two facts about labels that nnU-Net's loader asks for."""

    all_labels = [0, 1]  # noqa: RUF012
    has_ignore_label = True


@pytest.fixture
def folder(tmp_path):
    for i, shape in enumerate([(2, 12, 14, 16), (2, 6, 7, 8)]):
        values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1
        blosc2.asarray(values, urlpath=str(tmp_path / f"case_{i}.b2nd"))
        mask = np.zeros((1, *shape[1:]), np.int8)
        mask[:, :, :, : shape[3] // 2] = 1
        blosc2.asarray(mask, urlpath=str(tmp_path / f"case_{i}_mask.b2nd"))
    return tmp_path


def _loader(cases, patch, transforms=()):
    return UnlabeledLoader(cases, 4, patch, patch, Labels(), ComposeTransforms(list(transforms)))


def test_lists_cases_without_masks_and_segmentations(folder):
    (folder / "case_0_seg.b2nd").touch()
    (folder / ".tmp_x.b2nd").touch()
    (folder / "manifest.json").touch()
    assert unlabeled_identifiers(folder) == ["case_0", "case_1"]
    assert unlabeled_identifiers(folder / "missing") == []


def test_patches_are_cut_from_the_image(folder):
    np.random.seed(0)
    batch = _loader(UnlabeledCases(folder, ["case_0"]), (8, 8, 8)).generate_train_batch()
    assert batch["data"].shape == (4, 2, 8, 8, 8)
    assert batch["data"].dtype == torch.float32
    assert batch["keys"] == ["case_0"] * 4
    # values of the test image rise by one per voxel along the last axis, by its size along the axis before
    assert torch.all(batch["data"].diff(dim=-1) == 1)
    assert torch.all(batch["data"].diff(dim=-2) == 16)


def test_patches_larger_than_the_image_are_padded_with_zeros(folder):
    np.random.seed(0)
    data = _loader(UnlabeledCases(folder, ["case_1"]), (8, 8, 8)).generate_train_batch()["data"]
    assert data.shape == (4, 2, 8, 8, 8)
    assert int((data[0, 0] != 0).sum()) == 6 * 7 * 8


def test_2d_patches_are_slices_of_the_3d_case(folder):
    np.random.seed(0)
    data = _loader(UnlabeledCases(folder, ["case_0"]), (8, 8)).generate_train_batch()["data"]
    assert data.shape == (4, 2, 8, 8)
    assert torch.all(data.diff(dim=-1) == 1)


def test_uniform_placement_covers_the_image(folder):
    np.random.seed(0)
    loader = _loader(UnlabeledCases(folder, ["case_0"]), (8, 8, 8))
    starts = [float(p[0, 0, 0, 0]) - 1 for _ in range(200) for p in loader.generate_train_batch()["data"]]
    corners = np.stack(np.unravel_index(np.array(starts, int), (12, 14, 16)))
    for axis, positions in zip(corners, (5, 7, 9), strict=True):
        counts = np.bincount(axis, minlength=positions)
        assert len(counts) == positions
        # 800 draws; five standard deviations of a uniform one
        share = 1 / positions
        assert np.abs(counts / 800 - share).max() < 5 * (share * (1 - share) / 800) ** 0.5


def test_mask_keeps_the_outside_at_zero(folder):
    np.random.seed(0)
    outside = MaskImageTransform([0], 0, -5)
    data = _loader(UnlabeledCases(folder, ["case_0"], with_mask=True), (12, 14, 16), [outside]).generate_train_batch()
    assert torch.all(data["data"][:, 0, :, :, 8:] == -5)
    assert torch.all(data["data"][:, 0, :, :, :8] > 0)
    assert torch.all(data["data"][:, 1] > 0)


def test_an_unreadable_case_is_named(folder):
    (folder / "broken.b2nd").write_bytes(b"not a blosc2 file")
    loader = _loader(NamedErrors(UnlabeledCases(folder, ["broken"])), (8, 8, 8))
    with pytest.raises(RuntimeError, match="case broken cannot be read"):
        loader.generate_train_batch()
