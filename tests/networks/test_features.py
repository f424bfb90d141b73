from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from nnssl.errors import UserError
from nnssl.networks.channel_dropout import make_scalable, scaled_channels
from nnssl.networks.features import (
    BlockMeans,
    FeatureTap,
    block_means,
    bottleneck,
    head_on_last_stage,
    last_but_one_decoder_stage,
    last_decoder_stage,
    max_pooled,
    with_deterministic_pooling,
)
from nnssl.networks.unwrap import set_deep_supervision
from tests.support.unets import KINDS, small_unet


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_return_the_lowest_and_the_last_feature(kind, dimensions):
    network = small_unet(kind, dimensions)
    layers = {
        "bottleneck": bottleneck(network),
        "last but one": last_but_one_decoder_stage(network),
        "last": last_decoder_stage(network),
    }
    seen: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        layer.module.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: output}))
    heads = network(torch.randn(2, 1, *(8,) * dimensions))
    assert seen["bottleneck"].shape == (2, 8, *(2,) * dimensions)
    assert seen["last"].shape == (2, 4, *(8,) * dimensions)
    assert seen["last but one"].shape == (2, 6, *(4,) * dimensions)
    assert [layer.channels for layer in layers.values()] == [8, 6, 4]
    torch.testing.assert_close(network.decoder.seg_layers[-1](seen["last"]), heads[0])


def test_layers_are_found_in_a_compiled_network():
    network = small_unet()
    compiled = torch.compile(network, backend="eager")
    assert bottleneck(compiled).module is network.encoder.stages[-1]
    assert last_decoder_stage(compiled).module is network.decoder.stages[-1]


@pytest.mark.parametrize("find", [bottleneck, last_but_one_decoder_stage, last_decoder_stage])
def test_other_networks_are_refused(find):
    with pytest.raises(UserError, match="cannot be found") as caught:
        find(nn.Sequential(nn.Conv3d(1, 2, 1)))
    assert caught.value.found == "Sequential"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_last_segmentation_layer_makes_the_logits_from_the_tapped_feature(
    kind, dimensions, deep_supervision, compiled
):
    network = small_unet(kind, dimensions)
    set_deep_supervision(network, deep_supervision)
    called = torch.compile(network, backend="eager") if compiled else network
    tap = FeatureTap(last_decoder_stage(called).module)
    x = torch.randn(1, 1, *(8,) * dimensions)
    for _ in range(2):
        with tap.open():
            output = called(x)
            feature = tap.output
        logits = output[0] if deep_supervision else output
        assert torch.equal(network.decoder.seg_layers[-1](feature), logits)
    head = head_on_last_stage(called, 5)
    assert head(feature).shape == (1, 5, *x.shape[2:])
    torch._dynamo.reset()


def test_a_gradient_flows_through_the_tapped_feature():
    network = small_unet(dimensions=2)
    tap = FeatureTap(last_decoder_stage(network).module)
    with tap.open():
        network(torch.randn(1, 1, 8, 8))
        tap.output.sum().backward()
    assert next(network.parameters()).grad is not None


def test_a_tap_changes_no_weight_and_no_result():
    plain, tapped = small_unet(dimensions=2), small_unet(dimensions=2)
    FeatureTap(bottleneck(tapped).module)
    x = torch.randn(1, 1, 8, 8)
    assert plain.state_dict().keys() == tapped.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(plain(x), tapped(x), strict=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_closed_tap_keeps_nothing(compiled):
    network = small_unet(dimensions=2)
    network = torch.compile(network, backend="eager") if compiled else network
    tap = FeatureTap(last_decoder_stage(network).module)
    with tap.open():
        network(torch.randn(1, 1, 8, 8))
    network(torch.randn(1, 1, 8, 8))
    assert last_decoder_stage(network).module.tapped is None
    with pytest.raises(RuntimeError, match="has not been called"):
        _ = tap.output
    torch._dynamo.reset()


@pytest.mark.parametrize(("shape", "target"), [((8, 6), (2, 3)), ((8, 6, 4), (2, 3, 4))])
def test_block_means_equal_pooling(shape, target):
    images = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    pool = {2: nn.functional.adaptive_avg_pool2d, 3: nn.functional.adaptive_avg_pool3d}[len(shape)]
    torch.testing.assert_close(block_means(images, target), pool(images, target))


def test_compiled_code_of_a_network_serves_the_taps_of_its_copy():
    torch._dynamo.reset()
    network = small_unet(dimensions=2)
    tap = FeatureTap(last_decoder_stage(network).module)
    copy = deepcopy(network)
    other = FeatureTap(last_decoder_stage(copy).module)
    with torch.no_grad():
        last_decoder_stage(copy).module.convs[0].all_modules[0].weight.mul_(2)
    x = torch.randn(1, 1, 8, 8)
    expected = []
    for one, its_tap in ((network, tap), (copy, other)):
        with its_tap.open():
            one(x)
            expected.append(its_tap.output)
        one.compile(backend="eager")
    for one, its_tap, feature in ((network, tap, expected[0]), (copy, other, expected[1]), (network, tap, expected[0])):
        one(x)
        with its_tap.open():
            one(x)
            assert torch.equal(its_tap.output, feature)
    assert not torch.equal(*expected)
    torch._dynamo.reset()


def test_a_tapped_layer_can_also_be_scaled_and_keeps_its_names():
    network = small_unet(dimensions=2)
    names = list(network.state_dict())
    layer = bottleneck(network).module
    make_scalable(layer)
    tap = FeatureTap(layer)
    assert list(network.state_dict()) == names
    with tap.open(), scaled_channels([layer], [torch.zeros(1, 8)]):
        network(torch.randn(1, 1, 8, 8))
        assert not tap.output.any()


@pytest.mark.parametrize("shape", [(7, 5), (6, 2, 9)])
def test_maximum_pooling_and_its_gradient_are_those_of_torch(shape):
    pool = {2: torch.nn.functional.max_pool2d, 3: torch.nn.functional.max_pool3d}[len(shape)]
    edges, strides = ([value if n >= 3 else 1 for n in shape] for value in (3, 2))
    ours, theirs = (torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0)) for _ in range(2))
    found, expected = max_pooled(ours.requires_grad_()), pool(theirs.requires_grad_(), edges, strides)
    assert torch.equal(found, expected)
    weights = torch.randn(found.shape)
    for result in (found, expected):
        (result * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    # torch's own raises where GPUs shall compute deterministically
    functions, seen = [found.grad_fn], set()
    while functions:
        function = functions.pop()
        seen.add(function.name())
        functions += [one for one, _ in function.next_functions if one is not None]
    assert not any("MaxPool" in name for name in seen)


def test_pooling_without_overlap_can_be_replaced():
    images = torch.randn(2, 3, 5, 8, 6)
    for pool, expected in (
        (nn.AvgPool3d((1, 2, 3), (1, 2, 3)), True),
        (nn.AvgPool3d(2), True),
        (nn.AvgPool3d(3, 2), False),
    ):
        network = with_deterministic_pooling(nn.Sequential(nn.Conv3d(3, 3, 1), nn.Sequential(pool)))
        assert isinstance(network[1][0], BlockMeans) is expected
        torch.testing.assert_close(network[1](images), pool(images))


def test_a_residual_encoder_computes_the_same_with_replaced_pooling():
    network, images = small_unet("residual", 3), torch.randn(2, 1, 8, 8, 8)
    expected, names = network(images), list(network.state_dict())
    with_deterministic_pooling(network)
    assert any(isinstance(module, BlockMeans) for module in network.modules())
    assert not any(isinstance(module, nn.AvgPool3d) for module in network.modules())
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network(images), expected)
