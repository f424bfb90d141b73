"""What a network computes on its way to its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nnssl.networks.unwrap import unwrap


def last_decoder_stage(network: nn.Module) -> nn.Module:
    """The stage of nnU-Net's U-Nets whose output, at full resolution, the last segmentation layer turns into logits."""
    decoder: Any = unwrap(network).decoder
    return decoder.stages[-1]


def head_on_last_stage(network: nn.Module, channels: int) -> nn.Module:
    """A 1x1 convolution from the output of `last_decoder_stage` to ``channels``, beside the segmentation layer."""
    decoder: Any = unwrap(network).decoder
    layer = decoder.seg_layers[-1]
    return type(layer)(layer.in_channels, channels, 1)


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
