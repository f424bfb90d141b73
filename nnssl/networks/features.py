"""Where the features of nnU-Net's networks are taken or changed."""

from __future__ import annotations

from typing import Any, NamedTuple

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
