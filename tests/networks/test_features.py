from __future__ import annotations

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from nnssl.networks.features import FeatureTap, head_on_last_stage, last_decoder_stage
from nnssl.networks.unwrap import set_deep_supervision


def unet(kind: type, dimensions: int) -> nn.Module:
    torch.manual_seed(0)
    convolution, norm = (nn.Conv2d, nn.InstanceNorm2d) if dimensions == 2 else (nn.Conv3d, nn.InstanceNorm3d)
    blocks = {"n_conv_per_stage" if kind is PlainConvUNet else "n_blocks_per_stage": 1}
    return kind(
        1, 3, (4, 6, 8), convolution, 3, (1, 2, 2), num_classes=2, n_conv_per_stage_decoder=1, norm_op=norm,
        nonlin=nn.LeakyReLU, deep_supervision=True, **blocks,
    )  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", [PlainConvUNet, ResidualEncoderUNet])
def test_the_last_segmentation_layer_makes_the_logits_from_the_tapped_feature(
    kind, dimensions, deep_supervision, compiled
):
    network = unet(kind, dimensions)
    set_deep_supervision(network, deep_supervision)
    called = torch.compile(network, backend="eager") if compiled else network
    tap = FeatureTap(last_decoder_stage(called))
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
    network = unet(PlainConvUNet, 2)
    tap = FeatureTap(last_decoder_stage(network))
    with tap.open():
        network(torch.randn(1, 1, 8, 8))
        tap.output.sum().backward()
    assert next(network.parameters()).grad is not None


@pytest.mark.parametrize("compiled", [False, True])
def test_a_closed_tap_keeps_nothing(compiled):
    network = unet(PlainConvUNet, 2)
    network = torch.compile(network, backend="eager") if compiled else network
    tap = FeatureTap(last_decoder_stage(network))
    with tap.open():
        network(torch.randn(1, 1, 8, 8))
    network(torch.randn(1, 1, 8, 8))
    assert tap._output is None
    with pytest.raises(RuntimeError, match="has not been called"):
        _ = tap.output
    torch._dynamo.reset()
