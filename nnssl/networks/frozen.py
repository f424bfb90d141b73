"""Networks through which gradients flow, but into which none goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """Forward passes in this context give gradients to the inputs of ``module`` only, not to its parameters."""
    trained = [p for p in module.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    try:
        yield module
    finally:
        for p in trained:
            p.requires_grad_(True)
