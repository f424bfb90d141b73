"""Containers without NumPy, for files that are read back without running code."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch


def plain(value: Any) -> Any:
    """``value`` with NumPy scalars and arrays as Python numbers and tensors, paths as text, recursively.

    What it returns can be read back by ``torch.load(weights_only=True)``.
    """
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value
