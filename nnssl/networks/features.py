"""Where nnU-Net's networks compute features, and how they are taken or changed there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from nnssl.errors import UserError
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
    encoder, _ = _encoder_and_decoder(network)
    return FeatureLayer(encoder.stages[-1], int(encoder.output_channels[-1]))


def last_decoder_stage(network: nn.Module) -> FeatureLayer:
    """The last stage of the decoder, from whose output the full-resolution head is computed.

    Raises:
        UserError: if the network has no ``decoder.stages`` as nnU-Net's U-Nets do.
    """
    _, decoder = _encoder_and_decoder(network)
    return FeatureLayer(decoder.stages[-1], decoder.seg_layers[-1].in_channels)


def head_on_last_stage(network: nn.Module, channels: int) -> nn.Module:
    """A 1x1 convolution from the output of `last_decoder_stage` to ``channels``, beside the segmentation layer."""
    _, decoder = _encoder_and_decoder(network)
    layer = decoder.seg_layers[-1]
    return type(layer)(layer.in_channels, channels, 1)


def _encoder_and_decoder(network: nn.Module) -> tuple[Any, Any]:
    network = unwrap(network)
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

    Works inside ``torch.compile`` if made before the first forward pass. Closed, it holds no tensor.

    Args:
        module: part of a network.
    """

    def __init__(self, module: nn.Module):
        self._open = False
        self._output: torch.Tensor | None = None
        module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        if self._open:
            self._output = output

    @contextmanager
    def open(self) -> Iterator[FeatureTap]:
        """Context in which the module's output is kept."""
        self._open = True
        try:
            yield self
        finally:
            self._open, self._output = False, None

    @property
    def output(self) -> torch.Tensor:
        """Output of the last forward pass since the tap was opened."""
        if self._output is None:
            raise RuntimeError("the module has not been called since the tap was opened")
        return self._output
