"""Files that are either whole or not there, and JSON with errors that a user can mend."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnssl.errors import UserError


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; renames it to ``path`` if the block succeeds.

    The temporary name keeps the ending of ``path`` (readers and writers choose the format by it) and begins with
    ``.tmp_``. A block that raises leaves the old file as it was. The data reach the disk before the rename, so a
    power cut leaves either the old or the new file.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".tmp_", suffix="_" + final.name, dir=final.parent)
    os.close(handle)
    os.unlink(name)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `atomic_path`, for writers that put further files beside ``path``, such as the spacing file of a 3D TIFF.

    Yields a path of the same name in a hidden folder beside ``path``. If the block succeeds, all files in that folder
    are moved beside ``path``, ``path`` last: where it is, the others are. A block that raises leaves nothing behind.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".tmp_", dir=final.parent))
    try:
        yield folder / final.name
        for file in sorted(folder.iterdir(), key=lambda written: (written.name == final.name, written.name)):
            with open(file, "rb") as written:
                os.fsync(written.fileno())
            os.replace(file, final.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(data: Any, path: str | os.PathLike[str], *, sort_keys: bool = False) -> None:
    """Writes ``data`` as JSON (indent 4), atomically; NumPy scalars and arrays become numbers and lists."""
    text = json.dumps(data, indent=4, sort_keys=sort_keys, default=_plain)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], *, fix: str | None = None) -> Any:
    """Reads a JSON file; ``UserError`` with the given ``fix`` if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError("file not found", where=path, fix=fix) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError("file is not valid JSON", where=path, found=str(error), fix=fix) from None


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset, tuple)):
        return list(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
