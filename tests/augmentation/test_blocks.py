import pytest
import torch

from nnssl.augmentation.blocks import block_edges, count_blocks, random_blocks


@pytest.mark.parametrize(
    ("shape", "strides", "edges"),
    [
        ((256, 256), (64, 64), (64, 64)),
        ((128, 128, 128), (32, 32, 32), (32, 32, 32)),
        ((40, 56, 40), (8, 8, 8), (8, 16, 8)),
        ((7, 160, 160), (1, 32, 32), (2, 32, 32)),
        ((8, 16), (8, 8), (8, 8)),
        ((4, 16), (8, 4), (4, 4)),
    ],
)
def test_edges_are_multiples_of_the_stride_near_a_quarter(shape, strides, edges):
    assert block_edges(shape, strides, 4) == edges


@pytest.mark.parametrize(("shape", "edges"), [((16, 16), (4, 4)), ((16, 12, 10), (4, 4, 4)), ((6, 9), (6, 4))])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_the_drawn_number_of_whole_blocks_is_masked(shape, edges, share):
    torch.manual_seed(0)
    masks = random_blocks(5, shape, edges, share)
    assert masks.shape == (5, 1, *shape)
    assert masks.dtype == torch.bool
    blocks = count_blocks(shape, edges)
    for mask in masks[:, 0]:
        pieces = [mask]
        for axis, edge in enumerate(edges):
            pieces = [part for piece in pieces for part in piece.split(edge, axis)]
        assert len(pieces) == blocks
        assert all(piece.all() or not piece.any() for piece in pieces)
        assert sum(bool(piece.all()) for piece in pieces) == int(share * blocks)


def test_half_of_the_voxels_of_a_divisible_patch_and_another_half_for_each_mask():
    torch.manual_seed(0)
    masks = random_blocks(8, (16, 16, 16), (4, 4, 4), 0.5)
    assert (masks.float().mean((1, 2, 3, 4)) == 0.5).all()
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 8
    # no block is preferred
    often = random_blocks(2000, (4, 4), (1, 1), 0.5).float().mean(0)
    assert (often - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(("edges", "share"), [((0, 2), 0.5), ((2, 2), 1.1), ((2, 2), -0.1)])
def test_unusable_arguments(edges, share):
    with pytest.raises(ValueError, match="must"):
        random_blocks(1, (4, 4), edges, share)
    with pytest.raises(ValueError, match="at least one block"):
        block_edges((4, 4), (1, 1), 0)
