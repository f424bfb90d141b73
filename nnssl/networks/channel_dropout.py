"""Dropout of whole channels at chosen layers of a network that was built without any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from nnssl.networks.class_exchange import mix_in


def make_scalable(module: nn.Module) -> None:
    """Lets `scaled_channels` reach the output of ``module``, now and in copies that are made of it later.

    Weights, their names and results are what they were, see `mix_in`.
    """
    if not is_scalable(module):
        mix_in(_Scalable, module)
        module.channel_factors = None  # type: ignore[assignment]


def is_scalable(module: nn.Module) -> bool:
    """Whether ``module`` went through `make_scalable`."""
    return isinstance(module, _Scalable)


@contextmanager
def scaled_channels(modules: Sequence[nn.Module], factors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Multiplies the outputs of ``modules`` by factors of their own for the time of a block.

    Args:
        modules: modules prepared with `make_scalable` that return one tensor ``(N, C, *S)``.
        factors: ``(N, C)`` for each of them.

    Raises:
        TypeError: if a module was not prepared.
    """
    scalable = [module for module in modules if isinstance(module, _Scalable)]
    if len(scalable) < len(modules):
        raise TypeError("not all modules were prepared with make_scalable")
    try:
        for module, own in zip(scalable, factors, strict=True):
            module.channel_factors = own
        yield
    finally:
        for module in scalable:
            module.channel_factors = None


def dropout_factors(uniform: torch.Tensor, rate: float) -> torch.Tensor:
    """Factors of dropout: 0 with probability ``rate``, else ``1 / (1 - rate)``, so that the expectation is 1.

    Args:
        uniform: random numbers, uniform in [0, 1), of any shape.
        rate: at least 0 and below 1.

    >>> dropout_factors(torch.tensor([0.1, 0.5, 0.9]), 0.5)
    tensor([0., 2., 2.])
    """
    if not 0 <= rate < 1:
        raise ValueError(f"the rate of dropout must be at least 0 and below 1, got {rate}")
    return (uniform >= rate) / (1 - rate)


class _Scalable(nn.Module):
    """Mixed into the class of a module; its output keeps number format and memory layout."""

    channel_factors: torch.Tensor | None

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        output = super().forward(*inputs)
        if self.channel_factors is None:
            return output
        factors = self.channel_factors.to(output.dtype)
        return output * factors.reshape(*factors.shape, *[1] * (output.ndim - 2))
