from __future__ import annotations

import pytest
import torch

from nnssl.networks.discriminator import MapDiscriminator
from nnssl.networks.frozen import frozen

SMALL = (4, 6, 8, 10)


@pytest.mark.parametrize("patch", [(16, 16), (16, 16, 16), (9, 40), (3, 20, 24), (1, 16, 16), (20, 7, 5)], ids=str)
def test_any_patch_becomes_two_logits(patch):
    network = MapDiscriminator(2, 3, patch, SMALL)
    logits = network(torch.randn(2, 2, *patch), torch.randn(2, 3, *patch))
    assert logits.shape == (2, 2)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_published_size_and_strides():
    network = MapDiscriminator(1, 1, (112, 112, 80))
    layers = [network.map_stem, *network.convolutions]
    assert [layer.out_channels for layer in layers] == [64, 128, 256, 512]
    assert all(layer.kernel_size == (4, 4, 4) and layer.stride == (2, 2, 2) for layer in layers)


def test_axes_of_one_voxel_are_kept():
    network = MapDiscriminator(1, 1, (4, 32), SMALL)
    assert [layer.stride for layer in (network.map_stem, *network.convolutions)] == [(2, 2), (2, 2), (1, 2), (1, 2)]


def test_maps_and_image_both_matter():
    torch.manual_seed(0)
    network = MapDiscriminator(1, 1, (16, 16), SMALL)
    maps, images = torch.randn(1, 1, 16, 16), torch.randn(1, 1, 16, 16)
    first = network(maps, images)
    assert not torch.equal(first, network(maps * 2, images))
    assert not torch.equal(first, network(maps, images * 2))


def test_dropout_is_asked_before_each_inner_convolution():
    network, channels = MapDiscriminator(1, 1, (16, 16), SMALL), []

    def dropout(features):
        channels.append(features.shape[1])
        return features * 0

    network(torch.randn(1, 1, 16, 16), torch.randn(1, 1, 16, 16), dropout)
    assert channels == [4, 6, 8]


def test_frozen_passes_gradients_to_the_input_only():
    network = MapDiscriminator(1, 1, (16, 16), SMALL)
    fixed = network.map_stem.bias.requires_grad_(False)
    maps = torch.randn(1, 1, 16, 16, requires_grad=True)
    with frozen(network):
        network(maps, torch.randn(1, 1, 16, 16)).sum().backward()
    assert maps.grad.abs().sum() > 0
    assert all(p.grad is None for p in network.parameters())
    assert not fixed.requires_grad
    assert network.image_stem.bias.requires_grad
