"""Property files of preprocessed cases, which nnU-Net keeps as pickles, vetted before nnU-Net loads them."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnssl.errors import UserError

_NUMPY = {
    ("multiarray", "_reconstruct"),
    ("multiarray", "scalar"),
    ("numeric", "_frombuffer"),
}
_ALLOWED = {
    *((f"numpy.{core}.{module}", name) for core in ("core", "_core") for module, name in _NUMPY),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "slice"),
    ("builtins", "complex"),
    ("builtins", "bytearray"),
    ("_codecs", "encode"),
}


class _PlainUnpickler(pickle.Unpickler):
    """Makes containers, numbers, texts and NumPy arrays; calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def read_properties(path: str | os.PathLike[str]) -> Any:
    """What a property file holds, without running code.

    Raises:
        UserError: if the file names code to be run, or is no pickle.
    """
    fix = "delete the file and run nnssl_plan_and_preprocess again: it makes only what is missing"
    try:
        return _PlainUnpickler(io.BytesIO(Path(path).read_bytes())).load()
    except pickle.UnpicklingError as error:
        raise UserError(
            "the property file wants to run code while it is read, or is damaged",
            where=path,
            expected="numbers, texts, containers and NumPy arrays only",
            found=error,
            fix=fix,
        ) from None
    except (EOFError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise UserError(
            "the property file is damaged", where=path, found=error or type(error).__name__, fix=fix
        ) from None


def vet_properties(folder: str | os.PathLike[str], cases: Iterable[str]) -> None:
    """`read_properties` of ``cases`` for its refusals; files that are missing are left to the reader of the case."""
    for case in cases:
        path = Path(folder, f"{case}.pkl")
        if path.is_file():
            read_properties(path)
