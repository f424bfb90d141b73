from __future__ import annotations

import pytest
import torch
from torch import nn

from nnssl.errors import UserError
from nnssl.networks.features import bottleneck, last_decoder_stage
from tests.support.unets import KINDS, small_unet


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_return_the_lowest_and_the_last_feature(kind, dimensions):
    network = small_unet(kind, dimensions)
    layers = {"bottleneck": bottleneck(network), "last": last_decoder_stage(network)}
    seen: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        layer.module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    heads = network(torch.randn(2, 1, *(8,) * dimensions))
    assert seen["bottleneck"].shape == (2, 8, *(2,) * dimensions)
    assert seen["last"].shape == (2, 4, *(8,) * dimensions)
    assert [layer.channels for layer in layers.values()] == [8, 4]
    torch.testing.assert_close(network.decoder.seg_layers[-1](seen["last"]), heads[0])


def test_layers_are_found_in_a_compiled_network():
    network = small_unet()
    compiled = torch.compile(network, backend="eager")
    assert bottleneck(compiled).module is network.encoder.stages[-1]
    assert last_decoder_stage(compiled).module is network.decoder.stages[-1]


@pytest.mark.parametrize("find", [bottleneck, last_decoder_stage])
def test_other_networks_are_refused(find):
    with pytest.raises(UserError, match="cannot be found") as caught:
        find(nn.Sequential(nn.Conv3d(1, 2, 1)))
    assert caught.value.found == "Sequential"
