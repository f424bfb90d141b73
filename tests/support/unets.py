"""Small networks of the kinds that nnU-Net plans."""

from __future__ import annotations

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

KINDS = {"plain": PlainConvUNet, "residual": ResidualEncoderUNet}


def small_unet(kind: str = "plain", dimensions: int = 3, deep_supervision: bool = True) -> nn.Module:
    """A U-Net of three stages with 4, 6 and 8 features, one input channel and two classes; the same at each call."""
    blocks = {"plain": "n_conv_per_stage", "residual": "n_blocks_per_stage"}[kind]
    torch.manual_seed(0)
    return KINDS[kind](
        input_channels=1,
        n_stages=3,
        features_per_stage=[4, 6, 8],
        conv_op={2: nn.Conv2d, 3: nn.Conv3d}[dimensions],
        kernel_sizes=3,
        strides=[1, 2, 2],
        num_classes=2,
        n_conv_per_stage_decoder=[1, 1],
        conv_bias=True,
        norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dimensions],
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision,
        **{blocks: [1, 1, 1]},
    )
