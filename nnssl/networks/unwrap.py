"""The plain module inside ``torch.compile`` and distributed wrappers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel


def unwrap(network: nn.Module) -> nn.Module:
    """The module that owns parameters under their own names, without compile and DDP wrappers."""
    while isinstance(network, (OptimizedModule, DistributedDataParallel)):
        network = network._orig_mod if isinstance(network, OptimizedModule) else network.module
    return network


def set_deep_supervision(network: nn.Module, enabled: bool) -> None:
    """Switches the outputs of nnU-Net's networks between a list of heads (full resolution first) and one tensor."""
    decoder: Any = unwrap(network).decoder
    decoder.deep_supervision = enabled


@contextmanager
def deep_supervision(network: nn.Module, enabled: bool) -> Iterator[None]:
    """`set_deep_supervision` for the time of a block."""
    decoder: Any = unwrap(network).decoder
    before = decoder.deep_supervision
    decoder.deep_supervision = enabled
    try:
        yield
    finally:
        decoder.deep_supervision = before


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """While inside, all parts of a network stand in evaluation mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
