from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nnssl.errors import UserError
from nnssl.networks.features import bottleneck, encoder_stages, last_but_one_decoder_stage, voxel_projector
from nnssl.networks.variational import ImageDecoder, LatentGaussian, kl_to_standard_normal, sample
from tests.support.unets import KINDS, small_unet


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_made_from_the_bottleneck(kind, dimensions):
    network = small_unet(kind, dimensions)
    features = network.encoder(torch.randn(2, 1, *(16,) * dimensions))[-1]
    gaussian = LatentGaussian(dimensions, bottleneck(network).channels, 8)
    decoder = ImageDecoder(network, channels=3)
    mean, log_variance = gaussian(features)
    assert mean.shape == log_variance.shape == (2, 8, *(4,) * dimensions)
    image = decoder(sample(mean, log_variance, torch.randn_like(mean)))
    assert image.shape == (2, 3, *(16,) * dimensions)
    # half of 6 and of 4 features on the way up
    assert [stage.out_channels for stage in decoder.stages[::2]] == [3, 2]
    image.sum().backward()
    assert all(p.grad is not None for module in (gaussian, decoder) for p in module.parameters())
    assert next(network.encoder.parameters()).grad is not None
    assert all(p.grad is None for p in network.decoder.seg_layers.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_skips_the_bottleneck_reaches_the_image(kind):
    network = small_unet(kind, 2)
    features = network.encoder(torch.randn(2, 1, 16, 16))
    skipped = [tensor.detach().requires_grad_() for tensor in features[:-1]]
    decoder = ImageDecoder(network, 1, skips=True)
    image = decoder(torch.zeros(2, decoder.latent_channels, *features[-1].shape[2:]), *skipped)
    assert image.shape == (2, 1, 16, 16)
    (image[0].square().sum()).backward()
    for tensor in skipped:
        assert tensor.grad[0].abs().sum() > 0
        assert tensor.grad[1].abs().sum() == 0
    assert [layer.channels for layer in encoder_stages(network)] == list(network.encoder.output_channels)


def test_other_networks_are_refused():
    with pytest.raises(UserError, match="cannot be found"):
        ImageDecoder(nn.Sequential(nn.Conv3d(1, 2, 1)), 1)


def test_kl_by_hand():
    assert kl_to_standard_normal(torch.zeros(3), torch.zeros(3)).item() == 0
    mean, log_variance = torch.tensor([2.0, 0.0]), torch.tensor([0.0, math.log(4)])
    expected = (0.5 * 4 + 0.5 * (4 - math.log(4) - 1)) / 2
    assert kl_to_standard_normal(mean, log_variance).item() == pytest.approx(expected)
    log_variance = torch.linspace(-20, 20, 1001)
    assert all(kl_to_standard_normal(torch.zeros(1), one[None]) >= 0 for one in log_variance)


def test_kl_agrees_with_torch():
    generator = torch.Generator().manual_seed(0)
    mean, log_variance = torch.randn(50, generator=generator), torch.randn(50, generator=generator)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0.0, 1.0)).mean()
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected)


def test_samples_have_mean_and_variance():
    mean, log_variance = torch.full((10000,), 3.0), torch.full((10000,), math.log(4.0))
    noise = torch.randn(10000, generator=torch.Generator().manual_seed(0))
    drawn = sample(mean, log_variance, noise)
    assert drawn.mean().item() == pytest.approx(3, abs=0.1)
    assert drawn.std().item() == pytest.approx(2, abs=0.1)
    assert torch.equal(sample(mean, log_variance, None), mean)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_projector(dimensions):
    layer = last_but_one_decoder_stage(small_unet(dimensions=dimensions))
    assert voxel_projector(layer, dimensions)(torch.randn(1, 6, *(4,) * dimensions)).shape == (
        1,
        64,
        *(4,) * dimensions,
    )
