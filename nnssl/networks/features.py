"""Where nnU-Net's networks compute features, and how they are taken or changed there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from nnssl.errors import UserError
from nnssl.networks.class_exchange import mix_in
from nnssl.networks.ema import EMATeacher
from nnssl.networks.unwrap import unwrap


class FeatureLayer(NamedTuple):
    """A module of a network and the number of channels of what it returns."""

    module: nn.Module
    channels: int


def bottleneck(network: nn.Module) -> FeatureLayer:
    """The last stage of the encoder, whose output has the lowest resolution.

    Found by the structure that nnU-Net's U-Nets share (``encoder.stages``, plain or residual).

    Raises:
        UserError: if the network is built otherwise.
    """
    return encoder_stages(network)[-1]


def encoder_stages(network: nn.Module) -> list[FeatureLayer]:
    """The stages of the encoder, highest resolution first.

    Raises:
        UserError: if the network is built otherwise.
    """
    encoder, _ = _encoder_and_decoder(network)
    channels = map(int, encoder.output_channels)
    return [FeatureLayer(stage, number) for stage, number in zip(encoder.stages, channels, strict=True)]


def last_decoder_stage(network: nn.Module) -> FeatureLayer:
    """The last stage of the decoder, from whose output the full-resolution head is computed.

    Raises:
        UserError: if the network has no ``decoder.stages`` as nnU-Net's U-Nets do.
    """
    return _decoder_stage(network, 1)


def last_but_one_decoder_stage(network: nn.Module) -> FeatureLayer:
    """The stage of the decoder before the last, usually of half the resolution; the only stage if there is one.

    Raises:
        UserError: if the network has no ``decoder.stages`` as nnU-Net's U-Nets do.
    """
    return _decoder_stage(network, 2)


def _decoder_stage(network: nn.Module, from_end: int) -> FeatureLayer:
    _, decoder = _encoder_and_decoder(network)
    position = max(len(decoder.stages) - from_end, 0)
    return FeatureLayer(decoder.stages[position], decoder.seg_layers[position].in_channels)


def head_on_last_stage(network: nn.Module, channels: int) -> nn.Module:
    """A 1x1 convolution from the output of `last_decoder_stage` to ``channels``, beside the segmentation layer."""
    _, decoder = _encoder_and_decoder(network)
    layer = decoder.seg_layers[-1]
    return type(layer)(layer.in_channels, channels, 1)


def projector_on_last_stage(network: nn.Module, channels: int) -> nn.Module:
    """Two 1x1 convolutions with a PReLU between them, from the output of `last_decoder_stage` to ``channels``."""
    features = last_decoder_stage(network).channels
    return nn.Sequential(head_on_last_stage(network, features), nn.PReLU(), head_on_last_stage(network, channels))


def affine_map(layer: nn.Module) -> torch.Tensor:
    """Weights of a convolution of kernel 1, and its bias as the last column: ``(out, in + 1)``."""
    weight: Any = layer.weight
    bias: Any = layer.bias
    return torch.cat([weight.flatten(1), bias[:, None]], 1)


def encoder_of(network: nn.Module) -> Any:
    """The encoder of one of nnU-Net's U-Nets: ``stages``, ``output_channels``, ``strides``, ``conv_op`` and so on.

    Raises:
        UserError: if the network is built otherwise.
    """
    return _encoder_and_decoder(network)[0]


def voxel_projector(layer: FeatureLayer, dimensions: int, channels: int = 64) -> nn.Module:
    """Two convolutions of kernel 1 with a LeakyReLU between, from the output of a layer to ``channels``."""
    convolution: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    return nn.Sequential(convolution(layer.channels, channels, 1), nn.LeakyReLU(), convolution(channels, channels, 1))


def vector_projector(layer: FeatureLayer, channels: int = 64) -> nn.Module:
    """As `voxel_projector`, for one vector ``(N, C)`` per patch."""
    return nn.Sequential(nn.Linear(layer.channels, channels), nn.LeakyReLU(), nn.Linear(channels, channels))


def total_strides(network: nn.Module) -> tuple[int, ...]:
    """Voxels per voxel of the bottleneck along each spatial axis."""
    encoder, _ = _encoder_and_decoder(network)
    return tuple(math.prod(along) for along in zip(*encoder.strides, strict=True))


def block_means(images: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Images ``(N, C, *S)`` to ``(N, C, *shape)`` by the means of equal blocks; each of S is a multiple of shape's.

    torch's pooling has no deterministic gradient on GPUs.

    >>> block_means(torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]]), (1, 2))
    tensor([[[[3., 5.]]]])
    """
    means = images
    for axis, size in enumerate(shape, 2):
        means = means.unflatten(axis, (size, -1)).mean(axis + 1)
    return means


class BlockMeans(nn.Module):
    """``nn.AvgPool3d`` without overlap, with edges ``(e_x, e_y, e_z)``; what does not fill a block is dropped."""

    def __init__(self, edges: Sequence[int]):
        super().__init__()
        self.edges = tuple(edges)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        shape = [size // edge for size, edge in zip(features.shape[2:], self.edges, strict=True)]
        whole: list[Any] = [slice(count * edge) for count, edge in zip(shape, self.edges, strict=True)]
        return block_means(features[(..., *whole)], shape)


def with_deterministic_pooling(network: nn.Module) -> nn.Module:
    """``network``, in which `BlockMeans` takes the place of ``nn.AvgPool3d`` without overlap; weights keep their names.

    torch refuses the gradient of the latter on GPUs in its deterministic mode. nnU-Net's residual encoders have it.
    """
    for module in network.modules():
        for name, child in module.named_children():
            if not isinstance(child, nn.AvgPool3d) or child.ceil_mode:
                continue
            edges, strides, padding = (
                (size,) * 3 if isinstance(size, int) else tuple(size)
                for size in (child.kernel_size, child.stride, child.padding)
            )
            if edges == strides and not any(padding):
                setattr(module, name, BlockMeans(edges))
    return network


def max_pooled(features: torch.Tensor) -> torch.Tensor:
    """Maximum pooling ``(N, C, *S)`` with edge 3 and stride 2, but not along axes of fewer than 3 voxels.

    torch's pooling has no deterministic gradient on GPUs.
    """
    pooled = features
    for axis in range(2, features.ndim):
        if features.shape[axis] >= 3:
            pooled = pooled.unfold(axis, 3, 2).amax(-1)
    return pooled


def _encoder_and_decoder(network: nn.Module) -> tuple[Any, Any]:
    network = unwrap(network)
    if isinstance(network, EMATeacher):
        network = network.network
    encoder, decoder = getattr(network, "encoder", None), getattr(network, "decoder", None)
    known = all(hasattr(encoder, name) for name in ("stages", "output_channels"))
    if not known or not all(hasattr(decoder, name) for name in ("stages", "seg_layers")):
        raise UserError(
            "this method works on features of the network, and they cannot be found in this one",
            expected="a U-Net of nnU-Net: encoder.stages, decoder.stages and decoder.seg_layers",
            found=type(network).__name__,
            fix="plan with an architecture of nnU-Net, or choose another trainer",
        )
    return encoder, decoder


class FeatureTap:
    """Keeps the output of a module while it is `open`.

    Works inside ``torch.compile``, for networks and their copies alike. Closed, it holds no tensor.

    Args:
        module: part of a network that returns one tensor; it gets another class (`mix_in`).
    """

    def __init__(self, module: nn.Module):
        mix_in(_Tapped, module)
        self._module: Any = module
        self._close()

    @contextmanager
    def open(self) -> Iterator[FeatureTap]:
        """Context in which the module's output is kept."""
        self._module.is_tapped = True
        try:
            yield self
        finally:
            self._close()

    def _close(self) -> None:
        self._module.is_tapped, self._module.tapped = False, None

    @property
    def output(self) -> torch.Tensor:
        """Output of the last forward pass since the tap was opened."""
        if self._module.tapped is None:
            raise RuntimeError("the module has not been called since the tap was opened")
        return self._module.tapped


class _Tapped(nn.Module):
    """Mixed into the class of a module whose output is read."""

    is_tapped: bool
    tapped: torch.Tensor | None

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output = super().forward(*inputs)
        if self.is_tapped:
            self.tapped = output
        return output
