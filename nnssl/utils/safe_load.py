"""Checkpoints of others, read without running their code."""

from __future__ import annotations

import os
import pickle
from typing import Any

import numpy as np
import torch

from nnssl.errors import UserError


def _numpy_globals() -> list[Any]:
    """What pickled NumPy scalars need; nnU-Net's logger puts them into its checkpoints."""
    core = np._core if hasattr(np, "_core") else np.core
    numbers = (np.float64, np.float32, np.float16, np.int64, np.int32, np.bool_)
    return [
        (core.multiarray.scalar, "numpy.core.multiarray.scalar"),
        (core.multiarray.scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *numbers,
        *{type(np.dtype(number)) for number in numbers},
    ]


def load_checkpoint(path: str | os.PathLike[str], map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads a checkpoint dictionary of nnssl or nnU-Net; only tensors, containers and numbers are restored.

    Raises:
        UserError: if the file is missing, damaged, not a checkpoint, or holds objects that would need code to be run.
    """
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise UserError("checkpoint not found", where=path) from None
    except pickle.UnpicklingError as error:
        raise UserError(
            "checkpoint holds objects that cannot be restored without running code from the file",
            where=path,
            found=str(error).split("\n")[0],
            fix="use a checkpoint written by nnU-Net or nnssl; this file may be damaged or malicious",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(
            "checkpoint cannot be read", where=path, found=str(error).split("\n")[0], fix="the file may be damaged"
        ) from None
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise UserError("not an nnU-Net checkpoint", where=path, expected="a dictionary with 'network_weights'")
    return checkpoint


def plain(value: Any) -> Any:
    """``value`` with NumPy scalars and arrays as Python numbers and tensors, paths as text, recursively.

    What it returns can be read back by `load_checkpoint`.
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
