from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from nnssl.networks.channel_dropout import dropout_factors, make_scalable, scaled_channels
from nnssl.networks.features import bottleneck, last_decoder_stage
from nnssl.networks.memory_format import layout_named, set_memory_format
from tests.support.unets import KINDS, small_unet


def layers_of(network: nn.Module) -> list[nn.Module]:
    return [bottleneck(network).module, last_decoder_stage(network).module]


def scalable_unet(kind: str = "plain", dimensions: int = 3) -> nn.Module:
    network = small_unet(kind, dimensions)
    for layer in layers_of(network):
        make_scalable(layer)
    return network


def patches(dimensions: int = 3) -> torch.Tensor:
    return torch.randn((2, 1, *(8,) * dimensions), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_factors_multiply_the_feature_that_the_head_sees(kind, dimensions):
    network, x = scalable_unet(kind, dimensions), patches(dimensions)
    last = last_decoder_stage(network).module
    seen = []
    handle = last.register_forward_hook(lambda module, inputs, output: seen.append(output))
    network(x)
    factors = torch.tensor([[0.0, 2.0, 1.0, 0.0], [1.0, 0.0, 2.0, 2.0]])
    with scaled_channels([last], [factors]):
        full, _ = network(x)
    handle.remove()
    expected = seen[0] * factors.reshape(2, 4, *[1] * dimensions)
    torch.testing.assert_close(seen[1], expected)
    torch.testing.assert_close(full, network.decoder.seg_layers[-1](expected))


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_channels_of_the_bottleneck_reach_every_head(kind):
    network, x = scalable_unet(kind), patches()
    before = network(x)
    with scaled_channels([bottleneck(network).module], [torch.zeros(2, 8)]):
        after = network(x)
    assert all(not torch.allclose(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_network_is_the_network_outside_of_blocks(kind):
    plain, network, x = small_unet(kind), scalable_unet(kind), patches()
    with pytest.raises(ZeroDivisionError), scaled_channels(layers_of(network), [torch.zeros(2, 8), torch.zeros(2, 4)]):
        raise ZeroDivisionError
    assert list(plain.state_dict()) == list(network.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(plain(x), network(x), strict=True))


def test_copies_are_scaled_on_their_own():
    network, x = scalable_unet(), patches()
    copy = deepcopy(network)
    before = network(x)[0]
    with scaled_channels(layers_of(copy), [torch.ones(2, 8), torch.zeros(2, 4)]):
        assert torch.equal(network(x)[0], before)
        assert copy(x)[0].std((2, 3, 4)).max() == 0


def test_preparing_twice_scales_once():
    network, x = scalable_unet(), patches()
    kinds = [type(layer) for layer in layers_of(network)]
    for layer in layers_of(network):
        make_scalable(layer)
    assert [type(layer) for layer in layers_of(network)] == kinds
    bias = network.decoder.seg_layers[-1].bias.detach().reshape(1, 2, 1, 1, 1)
    expected = 3 * (network(x)[0] - bias)
    with scaled_channels(layers_of(network)[1:], [torch.full((2, 4), 3.0)]):
        torch.testing.assert_close(network(x)[0] - bias, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_format_and_memory_layout_are_kept(dtype):
    network, layout = scalable_unet(), layout_named("channels_last", 3)
    set_memory_format(network, layout)
    seen = []
    for layer in layers_of(network):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = patches().contiguous(memory_format=layout)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
        scaled_channels(layers_of(network), [torch.ones(2, 8), torch.ones(2, 4)]),
    ):
        network(x)
    assert [output.dtype for output in seen] == [dtype] * 2
    assert all(output.is_contiguous(memory_format=layout) for output in seen)


def test_code_compiled_for_a_plain_network_does_not_serve_a_prepared_one():
    x = patches()
    with torch.no_grad():
        plain = torch.compile(small_unet(), backend="eager")
        expected = plain(x)[0]
        network = scalable_unet()
        compiled = torch.compile(network, backend="eager")
        torch.testing.assert_close(compiled(x)[0], expected)
        for factors in (torch.zeros(2, 4), torch.rand(2, 4, generator=torch.Generator().manual_seed(0))):
            with scaled_channels(layers_of(network)[1:], [factors]):
                torch.testing.assert_close(compiled(x)[0], network(x)[0])
                assert not torch.allclose(compiled(x)[0], expected)
        torch.testing.assert_close(compiled(x)[0], expected)
    torch.compiler.reset()


def test_unprepared_modules_are_refused():
    network = small_unet()
    with pytest.raises(TypeError, match="make_scalable"), scaled_channels(layers_of(network), [torch.ones(2, 8)] * 2):
        network(patches())


def test_factors_have_expectation_one():
    factors = dropout_factors(torch.rand(20000, generator=torch.Generator().manual_seed(0)), 0.2)
    assert factors.unique().tolist() == [0, 1.25]
    assert factors.mean().item() == pytest.approx(1, abs=0.01)
    assert dropout_factors(torch.tensor([0.0, 0.7]), 0.0).tolist() == [1, 1]


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        dropout_factors(torch.rand(2), rate)
