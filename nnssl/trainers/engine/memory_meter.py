"""Bytes of living tensors, counted operation by operation."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Workspace = Callable[[Any, tuple, Any], int]
WORKSPACE = "workspace of an operation"


class MemoryMeter(TorchDispatchMode):
    """Context that follows all tensors which torch operations make on one kind of device, and notes their peak.

    A storage counts from the operation that makes it until it is freed, whoever held it: variables, the graph of the
    backward pass, gradients, an optimizer. Views count once. Works for fake tensors, which have sizes but no memory.

    Args:
        device_type: torch's (cpu, cuda).
        footprint: memory that a tensor of so many bytes takes; the bytes themselves by default.
        workspace: bytes that the operation ``(function, arguments, result)`` takes while it runs; none by default.

    Attributes:
        peak: largest sum of footprints so far.
        at_peak: what it was made of, by `phase`.
        living: what the present sum is made of.
    """

    def __init__(self, device_type: str, footprint: Callable[[int], int] = int, workspace: Workspace | None = None):
        super().__init__()
        self.device_type = device_type
        self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._footprint = footprint
        self._workspace = workspace
        self.living: Counter[str] = Counter()
        self._known: set[int] = set()
        self._phase = "other"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Tensors made within this block are counted under ``name``."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._count(tensor)
        self._note(0 if self._workspace is None else self._workspace(func, args, result))
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = self._footprint(storage.nbytes())
            self._known.add(key)
            self.living[self._phase] += size
            weakref.finalize(storage, self._forget, key, self._phase, size).atexit = False

    def _forget(self, key: int, phase: str, size: int) -> None:
        self._known.discard(key)
        self.living[phase] -= size

    def _note(self, extra: int) -> None:
        total = self.living.total() + extra
        if total > self.peak:
            self.peak = total
            self.at_peak = self.living.copy()
            if extra:
                self.at_peak[WORKSPACE] = extra


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))
