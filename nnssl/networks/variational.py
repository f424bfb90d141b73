"""A variational autoencoder that shares the encoder of nnU-Net's networks."""

from __future__ import annotations

from typing import Any

import torch
from dynamic_network_architectures.building_blocks.helper import convert_conv_op_to_dim, get_matching_convtransp
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU
from torch import nn

from nnssl.networks.features import encoder_of


class LatentGaussian(nn.Module):
    """Mean and logarithm of the variance of a latent image, one convolution (kernel 3) of the bottleneck each.

    Args:
        dimensions: 2 or 3.
        inputs: channels of what they are computed from.
        channels: channels of the latent image.
    """

    def __init__(self, dimensions: int, inputs: int, channels: int):
        super().__init__()
        convolution: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        self.mean = convolution(inputs, channels, 3, padding=1)
        self.log_variance = convolution(inputs, channels, 3, padding=1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logarithm of the variance ``(N, channels, *S)`` in float32."""
        return self.mean(features).float(), self.log_variance(features).float()


class ImageDecoder(nn.Module):
    """Makes an image from a latent one: as many stages as the encoder, and its strides.

    Each stage is a transposed convolution and a block (convolution, norm, nonlinearity of the network's kinds) with
    half the features of the encoder's stage of that resolution, rounded up. A convolution of kernel 1 makes the image.

    Args:
        network: a U-Net of nnU-Net, plain or residual, whose encoder is looked at; nothing of it is kept.
        channels: channels of the image.
        skips: whether blocks are given the output of the encoder's stage of their resolution, too.

    Raises:
        UserError: if ``network`` is none.
    """

    def __init__(self, network: nn.Module, channels: int, skips: bool = False):
        super().__init__()
        encoder = encoder_of(network)
        features = [-(-int(n) // 2) for n in encoder.output_channels[:-1]] + [int(encoder.output_channels[-1])]
        transposed = get_matching_convtransp(encoder.conv_op)
        stages: list[nn.Module] = []
        for s in range(len(features) - 1, 0, -1):
            stride = tuple(encoder.strides[s])
            stages.append(transposed(features[s], features[s - 1], stride, stride, bias=encoder.conv_bias))
            shown = features[s - 1] + (int(encoder.output_channels[s - 1]) if skips else 0)
            stages.append(
                ConvDropoutNormReLU(
                    encoder.conv_op, shown, features[s - 1], encoder.kernel_sizes[s - 1], 1,
                    encoder.conv_bias, encoder.norm_op, encoder.norm_op_kwargs, None, None,
                    encoder.nonlin, encoder.nonlin_kwargs,
                )
            )  # fmt: skip
        self.stages = nn.Sequential(*stages)
        self.image = encoder.conv_op(features[0], channels, 1)
        self.dimensions = convert_conv_op_to_dim(encoder.conv_op)
        self.latent_channels = features[-1]

    def forward(self, latent: torch.Tensor, *skipped: torch.Tensor) -> torch.Tensor:
        """Latent image ``(N, C, *S)`` at the resolution of the bottleneck to ``(N, channels, *P)``.

        ``skipped``: outputs of the encoder's stages but the last, full resolution first, for a decoder with skips.
        """
        features = latent
        for number in range(0, len(self.stages), 2):
            features = self.stages[number](features)
            if skipped:
                features = torch.cat([features, skipped[-1 - number // 2].to(features.dtype)], 1)
            features = self.stages[number + 1](features)
        return self.image(features)


def sample(mean: torch.Tensor, log_variance: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """``mean + noise * exp(log_variance / 2)``, or the mean itself without noise, as in evaluation."""
    return mean if noise is None else mean + noise * (0.5 * log_variance).exp()


def kl_to_standard_normal(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """Mean over all elements of KL(N(mean, variance) || N(0, 1)), in nats and float32.

    ``(mean^2 + variance - log variance - 1) / 2`` (Kingma & Welling, ICLR 2014, appendix B).

    >>> kl_to_standard_normal(torch.ones(2), torch.zeros(2))
    tensor(0.5000)
    """
    mean, log_variance = mean.float(), log_variance.float()
    # expm1 keeps it at least 0 where the variance is close to 1
    return 0.5 * (mean.square() + log_variance.expm1() - log_variance).mean()
