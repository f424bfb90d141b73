from __future__ import annotations

import pytest
import torch

from nnssl.augmentation.displacement import (
    Windows,
    cell_edges,
    cell_means,
    cells_with,
    constant_voxels,
    fits,
    largest_edges,
    replaced,
    replaced_voxels,
    source_windows,
    target_windows,
    window_means,
)
from nnssl.losses.uncertainty import class_divergence


def windows(corners, edges, found=None):
    corners, edges = torch.tensor(corners), torch.tensor(edges)
    found = torch.ones(len(corners), dtype=torch.bool) if found is None else torch.tensor(found)
    return Windows(corners, edges, found, torch.zeros(len(corners)))


def usable(*shape):
    return torch.ones(shape, dtype=torch.bool)


def test_windows_are_at_most_a_share_of_the_patch():
    assert cell_edges((128, 50, 7)) == (4, 2, 1)
    assert cell_edges((33, 16)) == (1, 4)
    for shape, share in (((128, 96, 20), 1 / 8), ((128, 96, 20), 1 / 4), ((64, 64), 0.2)):
        largest = largest_edges(shape, share)
        for n, cell, edge in zip(shape, cell_edges(shape), largest, strict=True):
            assert edge == 1 or edge * cell <= round(n * share)
    assert largest_edges((128, 10), 1 / 8) == (4, 10)


@pytest.mark.parametrize("shape", [(7, 5), (4, 6, 5)])
def test_means_of_windows_of_each_patch(shape):
    values = torch.randn(3, 2, *shape)
    edges = torch.tensor([[1] * len(shape), [2, 3, 1][: len(shape)], list(shape)])
    means = window_means(values, edges)
    for row, edge in enumerate(edges.tolist()):
        pieces = values[row]
        for axis, size in enumerate(edge, 1):
            pieces = pieces.unfold(axis, size, 1)
        expected = pieces.flatten(1 + len(shape)).mean(-1)
        found = means[(row, slice(None), *(slice(n) for n in expected.shape[1:]))]
        torch.testing.assert_close(found, expected)


def test_padding_is_constant_and_content_is_not():
    torch.manual_seed(0)
    images = torch.randn(2, 2, 16, 16)
    images[0, :, :6] = 0
    images[1, 0, :, 12:] = 3.0
    constant = constant_voxels(images)
    assert torch.equal(constant[0, 0].all(1), torch.arange(16) < 6)
    assert not constant[0, 0, 6:].any()
    assert not constant[1].any(), "the other channel shows something"
    assert torch.equal(cells_with(constant)[0, 0].all(1), torch.tensor([True, True, False, False]))
    assert torch.equal(constant_voxels(images * 2 + 1), constant)


def test_target_is_the_box_of_the_region():
    region = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    region[0, 0, 2:5, 3] = region[0, 0, 2, 4] = True
    target = target_windows(region, torch.rand(1, 1, 8, 8), usable(1, 1, 8, 8), (4, 4))
    assert target.corners.tolist() == [[2, 3]]
    assert target.edges.tolist() == [[3, 2]]
    assert target.found.tolist() == [True]


def test_target_of_a_large_region_is_where_confidence_is_lowest():
    confidence = torch.full((2, 1, 8, 8), 0.4)
    confidence[0, 0, 4:6, 5:7] = 0.1
    confidence[1, 0, 0, 0] = 0.1
    target = target_windows(usable(2, 1, 8, 8), confidence, usable(2, 1, 8, 8), (2, 2))
    assert target.corners.tolist() == [[4, 5], [0, 0]]
    assert target.edges.tolist() == [[2, 2]] * 2
    torch.testing.assert_close(target.means, torch.tensor([0.1, 0.325]))


def test_neither_target_nor_source_has_padding():
    region = usable(1, 1, 6, 6)
    good = usable(1, 1, 6, 6)
    good[0, 0, :3] = False
    confidence = torch.rand(1, 1, 6, 6) / 2
    confidence[0, 0, :3] = 0.0
    target = target_windows(region, confidence, good, (2, 2))
    assert target.corners[0, 0] >= 3
    sure = torch.full((1, 1, 6, 6), 0.8)
    sure[0, 0, :3] = 1.0
    logits = torch.randn(1, 2, 6, 6)
    source = source_windows(target, logits, logits, sure, good, 0.5, class_divergence)
    assert source.found.all()
    assert source.corners[0, 0] >= 3
    assert not target_windows(region, confidence, ~usable(1, 1, 6, 6), (2, 2)).found.any()


def test_source_is_the_most_similar_of_the_most_confident_windows():
    confidence = torch.full((1, 1, 4, 16), 0.2)
    logits = torch.zeros(1, 3, 4, 16)
    for at, (sure, kind) in {1: (0.97, 0), 4: (0.96, 1), 7: (0.95, 0), 10: (0.94, 0), 13: (0.93, 1)}.items():
        confidence[0, 0, 1:3, at : at + 2] = sure
        logits[0, kind, 1:3, at : at + 2] = 5
    own = torch.zeros(1, 3, 4, 16)
    own[0, 1] = 1.0
    target = windows([[0, 0]], [[2, 2]])

    def at(candidates, threshold=0.9):
        return source_windows(
            target, own, logits, confidence, usable(1, 1, 4, 16), threshold, class_divergence, candidates
        )

    assert at(1).corners.tolist() == [[1, 1]], "the most confident one"
    assert at(4).corners.tolist() == [[1, 4]], "the most similar of four"
    assert at(4).means.item() == pytest.approx(0.96)
    assert not at(4, 0.99).found.any()
    confidence[0, 0, :, 4:6] = 0.1
    assert at(4).corners.tolist() == [[1, 13]], "those of too little confidence make place for others"


def test_source_is_at_least_as_confident_as_the_target():
    confidence = torch.full((1, 1, 4, 4), 0.7)
    logits = torch.zeros(1, 2, 4, 4)
    sure = windows([[0, 0]], [[2, 2]])._replace(means=torch.tensor([0.8]))
    arguments = (logits, logits, confidence, usable(1, 1, 4, 4), 0.5, class_divergence)
    assert not source_windows(sure, *arguments).found.any()
    assert source_windows(sure._replace(means=torch.tensor([0.6])), *arguments).found.all()
    nowhere = sure._replace(found=torch.tensor([False]), means=torch.tensor([0.0]))
    assert not source_windows(nowhere, *arguments).found.any()


@pytest.mark.parametrize(("target", "source"), [((0, 1, 1), (1, 0, 2)), ((1, 1, 1), (1, 1, 2)), ((2, 0, 0), (0, 2, 0))])
def test_content_of_the_other_patch_is_moved(target, source):
    torch.manual_seed(0)
    images, others = torch.randn(2, 3, 16, 20, 24), torch.randn(2, 3, 16, 20, 24)
    edges = [2, 1, 2]
    targets = windows([list(target)] * 2, [edges] * 2)
    sources = windows([list(source)] * 2, [edges] * 2, [True, False])
    result = replaced(images, others, targets, sources)
    here, there = (tuple(slice(4 * c, 4 * (c + e)) for c, e in zip(at, edges, strict=True)) for at in (target, source))
    assert torch.equal(result[(0, slice(None), *here)], others[(0, slice(None), *there)])
    voxels = replaced_voxels(targets, sources, images.shape[2:])
    assert torch.equal(result[0, :, ~voxels[0, 0]], images[0, :, ~voxels[0, 0]])
    assert int(voxels[0].sum()) == 8 * 4 * 8
    assert torch.equal(result[1], images[1])
    assert not voxels[1].any()


def test_cells_between_two_corners():
    inside = fits((4, 3), torch.tensor([[1, 0], [3, 2]]), torch.tensor([[2, 1], [2, 2]]))
    assert inside[0, 0].nonzero().tolist() == [[1, 0], [1, 1], [2, 0], [2, 1]]
    assert not inside[1].any()
    assert cell_means(torch.ones(1, 2, 16, 7)).shape == (1, 2, 4, 7)
