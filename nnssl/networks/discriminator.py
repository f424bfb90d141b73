"""A network that tells where a prediction comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.functional import leaky_relu


def _unchanged(features: torch.Tensor) -> torch.Tensor:
    return features


class MapDiscriminator(nn.Module):
    """Classifies pairs of maps and image (Li et al., MICCAI 2020, figure 1 and released code), in 2D and 3D.

    A convolution (kernel 4, stride 2) on the maps and one on the image, added; three more of the kind; LeakyReLU 0.2
    after each; mean over all voxels; a linear layer. An axis that one voxel is left of keeps it (kernel 3, stride 1).

    Args:
        num_maps: channels of the maps.
        num_channels: channels of the image.
        patch_size: spatial shape of both.
        features: output channels of the convolutions.
    """

    def __init__(
        self,
        num_maps: int,
        num_channels: int,
        patch_size: Sequence[int],
        features: Sequence[int] = (64, 128, 256, 512),
    ):
        super().__init__()
        convolution: Any = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch_size)]
        shape = list(patch_size)
        geometries = []
        for _ in features:
            halved = [n > 1 for n in shape]
            kernel, stride = tuple(4 if h else 3 for h in halved), tuple(2 if h else 1 for h in halved)
            geometries.append((kernel, stride, 1))
            shape = [n // s for n, s in zip(shape, stride, strict=True)]
        self.map_stem = convolution(num_maps, features[0], *geometries[0])
        self.image_stem = convolution(num_channels, features[0], *geometries[0])
        pairs = zip(pairwise(features), geometries[1:], strict=True)
        self.convolutions = nn.ModuleList(convolution(*channels, *geometry) for channels, geometry in pairs)
        self.classifier = nn.Linear(features[-1], 2)

    def forward(
        self,
        maps: torch.Tensor,
        images: torch.Tensor,
        dropout: Callable[[torch.Tensor], torch.Tensor] = _unchanged,
    ) -> torch.Tensor:
        """Logits ``(N, 2)``.

        Args:
            maps: ``(N, num_maps, *patch_size)``.
            images: ``(N, num_channels, *patch_size)``.
            dropout: called with the features ``(N, C, *S)`` before each convolution but the first; returns their like.
        """
        x = leaky_relu(self.map_stem(maps) + self.image_stem(images), 0.2)
        for convolution in self.convolutions:
            x = leaky_relu(convolution(dropout(x)), 0.2)
        return self.classifier(x.flatten(2).mean(2))
