"""Refuses to run beside the DKFZ self-supervised pre-training framework, which has the same package name."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

MESSAGE = (
    "Another package called nnssl (the DKFZ framework for self-supervised pre-training) is installed in this "
    "environment and both overwrite each other: either use a fresh virtual environment for this package, or run "
    "'pip uninstall -y nnssl' until nothing is left and install this package again."
)


def refuse_other_nnssl() -> None:
    """Raises if another package called nnssl shares this environment.

    Called when nnssl is imported, and again by every command: an installation of the other one over ours can replace
    ``nnssl/__init__.py`` and with it the first call. A command ends with the message and exit code 2 and without a
    traceback (``SystemExit``), although its import of nnssl is what fails; anything else gets an ``ImportError``.
    """
    if not (_has_foreign_module() or any(not _is_ours(folder) for folder in _metadata_folders(sys.path))):
        return
    if _is_command(sys.argv, sys.orig_argv):
        print(MESSAGE, file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(MESSAGE)


def _has_foreign_module() -> bool:
    """True if the other package's files lie among ours: ours never has a module ``nnssl.architectures``."""
    spec = importlib.util.find_spec("nnssl.architectures")
    if spec is None:
        return False
    # a folder left over by a removed installation (bytecode only) is no package
    return spec.origin is not None or any(
        name.endswith(".py") for folder in spec.submodule_search_locations or () for name in os.listdir(folder)
    )


def _metadata_folders(search_path: Iterable[str]) -> Iterator[Path]:
    """Metadata folders of distributions called nnssl; a tenth of the time that ``importlib.metadata`` takes."""
    for folder in dict.fromkeys(search_path):
        try:
            names = os.listdir(folder or ".")
        except OSError:
            continue
        for name in names:
            if re.fullmatch(r"nnssl(-.+)?\.(dist|egg)-info", name, re.IGNORECASE):
                yield Path(folder, name)


def _is_ours(metadata: Path) -> bool:
    """True for ours, known by its command ``nnssl_predict``, and for remains without the two files that tell."""
    if not any((metadata / name).is_file() for name in ("METADATA", "PKG-INFO")):
        return True
    try:
        return "nnssl_predict" in (metadata / "entry_points.txt").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


def _is_command(arguments: list[str], original: list[str]) -> bool:
    """True in ``nnssl_train`` and its kind, and in ``python -m nnssl`` (``arguments[0]`` is not yet set there)."""
    program = Path(arguments[0]).name if arguments else ""
    return program.startswith("nnssl_") or (program == "-m" and "nnssl" in original)
