"""What tells one scan or checkpoint from another of the same name, without reading the file as a whole."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Iterable
from pathlib import Path


def files_content(files: Iterable[Path]) -> str:
    """Texts of `file_content`, in the order of the files."""
    return "; ".join(file_content(file) for file in files)


def file_content(file: Path) -> str:
    """Text that another content of a file changes, from its size and a few bytes.

    A file compressed by gzip holds the checksum of what it compresses, so that a copy elsewhere counts as the same.
    Of other files it is the place and the time of the last change.
    """
    found = file.stat()
    if file.name.lower().endswith(".gz") and found.st_size >= 8:
        with open(file, "rb") as stream:
            stream.seek(-8, os.SEEK_END)
            checksum = int.from_bytes(stream.read(4), "little")
        return f"{found.st_size} bytes, CRC-32 {checksum:08x}"
    return f"{found.st_size} bytes, changed at {found.st_mtime_ns} ns: {os.path.abspath(file)}"


def checkpoint_content(file: Path) -> str:
    """Text that another content of a checkpoint changes, from the checksums in the directory of the archive that it is.

    Files that are no such archive, which a prediction refuses anyway, have their size in its place.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            # without the name of the outermost folder, which may be that of a temporary file
            entries = sorted((e.filename.partition("/")[2], e.file_size, e.CRC) for e in archive.infolist())
    except (zipfile.BadZipFile, OSError):
        return f"{file.stat().st_size} bytes" if file.is_file() else "not there"
    return hashlib.sha256(repr(entries).encode()).hexdigest()[:16]
