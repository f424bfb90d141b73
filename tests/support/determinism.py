"""Finds operations that torch refuses on CUDA in its deterministic mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# from the documentation of torch.use_deterministic_algorithms, by the names of the kernels
_REFUSED = (
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
    "adaptive_max_pool2d_backward",
    "fractional_max_pool2d_backward",
    "fractional_max_pool3d_backward",
    "max_unpool2d",
    "max_unpool3d",
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "upsample_trilinear3d_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "reflection_pad3d_backward",
    "grid_sampler_2d_backward",
    "grid_sampler_3d_backward",
    "put",
    "put_",
    "histc",
    "median",
    "scatter_reduce",
    "scatter_reduce_",
    "_ctc_loss_backward",
)
_SUMS = ("nll_loss2d_forward",)
"""Refused unless every element has a result of its own."""


class _Refusals(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        # the fourth argument is the reduction, 0 for none
        if torch.are_deterministic_algorithms_enabled() and (name in _REFUSED or (name in _SUMS and args[3] != 0)):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def refused_on_cuda() -> Iterator[list[str]]:
    """A list that fills, within the context, with the operations that CUDA would refuse in deterministic mode."""
    found: list[str] = []
    with _Refusals(found):
        yield found
