"""Whether a NIfTI file is whole. SimpleITK fills what is missing with zeros and says nothing."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

_CHUNK = 1 << 20


def is_nifti(file: Path) -> bool:
    """Whether the name ends with .nii or .nii.gz."""
    return file.name.lower().endswith((".nii", ".nii.gz"))


def nifti_fault(file: Path, *, thorough: bool) -> str | None:
    """What is wrong with a NIfTI file, or None.

    Args:
        file: named .nii or .nii.gz.
        thorough: decompress the file and compare its checksum. Otherwise only the length is looked up, which a
            compressed file holds in its last four bytes, and the file is decompressed only if that is too small.

    Raises:
        Exception: whatever nibabel raises if it cannot read the header.
    """
    import nibabel

    # not the offset in the image's header, which nibabel sets to 0
    stored = nibabel.load(file).dataobj  # type: ignore[attr-defined]
    expected = stored.offset + math.prod(stored.shape) * stored.dtype.itemsize
    if not file.name.lower().endswith(".gz"):
        return _too_short(file.stat().st_size, expected)
    if not thorough and _recorded_length(file) == expected % 2**32:
        return None
    try:
        with gzip.open(file) as stream:
            length = sum(len(chunk) for chunk in iter(lambda: stream.read(_CHUNK), b""))
    except EOFError:
        return "the file is cut off"
    except (zlib.error, gzip.BadGzipFile) as error:
        return f"the file is damaged ({error})"
    return _too_short(length, expected)


def _recorded_length(file: Path) -> int:
    with open(file, "rb") as stream:
        stream.seek(-4, os.SEEK_END)
        return int.from_bytes(stream.read(4), "little")


def _too_short(length: int, expected: int) -> str | None:
    return f"the file is cut off: {length} of {expected} bytes" if length < expected else None
