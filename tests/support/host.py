"""Finds where code waits for the values of tensors."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# what item(), bool(), float(), comparisons in an if, and shapes that depend on values come down to
_READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "_unique2", "bincount")
# by a mask: how many elements there are has to be counted first
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_METHODS = ("numpy", "tolist", "cpu")


class _Reads(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _READS or (name in _INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])):
            _note(name, self.found)
        return func(*args, **(kwargs or {}))


@contextmanager
def reads_of_values(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A list that fills, within the context, with each place at which the host would have to wait for a device.

    Operations are seen on any device, so that a CPU tells where a CUDA device would be waited for.
    """
    found: list[str] = []
    with monkeypatch.context() as patch, _Reads(found):
        for name in _METHODS:
            patch.setattr(torch.Tensor, name, _reported(getattr(torch.Tensor, name), name, found))
        yield found


def _reported(method: Any, name: str, found: list[str]) -> Any:
    def reported(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        _note(name, found)
        return method(tensor, *args, **kwargs)

    return reported


def _note(operation: str, found: list[str]) -> None:
    """Adds the operation, and the line of nnssl that led to it."""
    frames = traceback.extract_stack()
    files = [frame.filename.replace("\\", "/") for frame in frames]
    # optimizers of torch count their steps in tensors of the host, whatever the device of the parameters; its loss
    # scaler, which nnU-Net has too, waits once per update
    if any("/torch/optim/" in file or "/torch/amp/" in file for file in files):
        return
    ours = [f"{file}:{frame.lineno}" for file, frame in zip(files, frames, strict=True) if "/nnssl/" in file]
    found.append(f"{operation} at {ours[-1] if ours else 'a place outside nnssl'}")
