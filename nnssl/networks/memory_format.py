"""Networks whose tensors stay in one memory layout from the first to the last layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def layout_named(name: str, dimensions: int) -> torch.memory_format:
    """torch's layout called ``contiguous`` or ``channels_last`` for images with 2 or 3 spatial dimensions."""
    if name == "contiguous":
        return torch.contiguous_format
    return torch.channels_last if dimensions == 2 else torch.channels_last_3d


def layout_of(network: nn.Module) -> torch.memory_format:
    """The layout that `set_memory_format` gave to ``network`` or to parts of it; contiguous if it was never called."""
    for module in network.modules():
        if hasattr(module, "_nnssl_layout"):
            return module._nnssl_layout  # type: ignore[return-value]
    return torch.contiguous_format


def set_memory_format(network: nn.Module, layout: torch.memory_format) -> None:
    """Lays the weights of ``network`` out, in place, and lets its instance norms keep that layout.

    torch's instance norm returns contiguous tensors, so that a network in channels-last copies every activation twice
    per norm. In channels-last its place is taken by a module with the same parameters, names and results (to rounding)
    that does not. Inputs still have to be laid out by the caller.
    """
    network.to(memory_format=layout)
    network._nnssl_layout = layout  # type: ignore[assignment]
    replaced = {plain: kept for kept, plain in _PLAIN.items()} if layout != torch.contiguous_format else _PLAIN
    for module in network.modules():
        # the class is exchanged, not the module: names, hooks and parameters in an optimizer stay what they are
        if type(module) in replaced and not module.track_running_stats:
            module.__class__ = replaced[type(module)]


class _SameLayout:
    """Instance normalization (Ulyanov et al., 2016) whose output has the memory layout of its input."""

    def forward(self: nn.InstanceNorm3d, x: torch.Tensor) -> torch.Tensor:  # type: ignore[misc]
        # Batch norm of one sample, and group norm with one channel per group, are instance norms, and their kernels
        # know channels-last. Group norm is the faster one forward in fp32, and by far the slower one backward.
        if x.dtype == torch.float32 and not torch.is_grad_enabled():
            return F.group_norm(x, self.num_features, self.weight, self.bias, self.eps)
        samples = [F.batch_norm(s, None, None, self.weight, self.bias, True, 0.0, self.eps) for s in x.split(1)]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


class _InstanceNorm2d(_SameLayout, nn.InstanceNorm2d): ...


class _InstanceNorm3d(_SameLayout, nn.InstanceNorm3d): ...


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    _InstanceNorm2d: nn.InstanceNorm2d,
    _InstanceNorm3d: nn.InstanceNorm3d,
}
