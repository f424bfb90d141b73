"""The plain module inside ``torch.compile`` and distributed wrappers."""

from __future__ import annotations

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
    unwrap(network).decoder.deep_supervision = enabled
