"""Reading checkpoints without running what they may hold."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnssl.errors import UserError

_REQUIRED = ("network_weights", "init_args", "trainer_name")


def read_checkpoint(path: str | os.PathLike[str], *, trust: bool = False) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU as numbers, texts, containers and tensors; no code of the file is run.

    NumPy numbers and arrays, which stock nnU-Net keeps in its log, are understood. Tensors are mapped from the file
    and read when they are used, so that a network is loaded without its optimizers; clone what has to survive a
    change of the file.

    Args:
        path: a file that ``torch.save`` wrote.
        trust: run the code that the file names, as plain ``pickle`` does. Only for files of known origin.

    Raises:
        UserError: if the file is missing, damaged or not a checkpoint, or can only be read by running its code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError("checkpoint not found", where=path)
    if not zipfile.is_zipfile(path):
        raise UserError(
            "not a checkpoint, or cut off while it was written",
            where=path,
            expected="a file written by torch.save",
            fix="take another checkpoint (-chk checkpoint_best.pth) or train on from the latest one",
        )
    try:
        if trust:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(path, error) from None
    except (RuntimeError, EOFError, KeyError, OSError) as error:
        raise UserError("the checkpoint is damaged", where=path, found=str(error).splitlines()[0]) from error


def read_model_checkpoint(path: str | os.PathLike[str], *, trust: bool = False) -> dict[str, Any]:
    """`read_checkpoint` for a trained network: checks that nnU-Net's entries are there.

    Raises:
        UserError: as `read_checkpoint`, and if the file lacks the weights, the trainer or the configuration.
    """
    checkpoint = read_checkpoint(path, trust=trust)
    missing = [key for key in _REQUIRED if not isinstance(checkpoint, dict) or key not in checkpoint]
    if not missing and "configuration" not in checkpoint["init_args"]:
        missing = ["init_args/configuration"]
    if missing:
        raise UserError("not a checkpoint of nnU-Net", where=path, expected=f"the entries {', '.join(missing)}")
    return checkpoint


def _refusal(path: Path, error: pickle.UnpicklingError) -> UserError:
    reason = re.search(r"GLOBAL (\S+)|WeightsUnpickler error: (.+)", str(error))
    return UserError(
        "the checkpoint wants to run code while it is read, which is refused",
        where=path,
        expected="numbers, texts, containers and tensors only",
        found=next(filter(None, reason.groups())) if reason else str(error).splitlines()[0],
        fix="ask its author for a plain checkpoint; if you know where it comes from, --trust_checkpoint runs its code",
    )


def _numpy_globals() -> list[Callable | tuple[Callable, str]]:
    """What unpickles NumPy numbers and arrays of numbers, under the names of NumPy 1 and 2."""
    scalar: Any = np.float64(0).__reduce__()[0]
    array: Any = np.zeros(0).__reduce__()[0]
    functions: list[Callable | tuple[Callable, str]] = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((scalar, "scalar"), (array, "_reconstruct"))
    ]
    numbers = dict.fromkeys(type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OSUVMm")
    return [*functions, np.dtype, np.ndarray, *numbers]
