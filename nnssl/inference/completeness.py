"""Whether a NIfTI file is whole and holds numbers. SimpleITK makes zeros of what is missing and of NaN, silently."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from nnssl.dataset.volumes import stream_nifti


def is_nifti(file: Path) -> bool:
    """Whether the name ends with .nii or .nii.gz."""
    return file.name.lower().endswith((".nii", ".nii.gz"))


def scan_fault(files: Iterable[Path], *, not_finite_is_zero: bool = False) -> str | None:
    """Why a case cannot be segmented although its headers can be read: the file and what is wrong with it, or None.

    Looks at NIfTI files, as thoroughly as `nifti_fault` does. Each is decompressed once.

    Args:
        files: of all channels.
        not_finite_is_zero: NaN and infinite values, which SimpleITK reads as 0, are meant to be that.
    """
    for file in filter(is_nifti, files):
        if fault := nifti_fault(file, thorough=True, not_finite_is_zero=not_finite_is_zero):
            return f"{file.name}: {fault}"
    return None


def nifti_fault(file: Path, *, thorough: bool, not_finite_is_zero: bool = False) -> str | None:
    """What is wrong with a NIfTI file, or None.

    Args:
        file: named .nii or .nii.gz.
        thorough: read the whole file, compare its checksum if it is compressed, and look for NaN and infinite values.
            Otherwise only the length is looked up, which a compressed file holds in its last four bytes, and the file
            is decompressed only if that is too small.
        not_finite_is_zero: NaN and infinite values are no fault.

    Raises:
        Exception: whatever nibabel raises if it cannot read the header.
    """
    import nibabel

    # not the offset in the image's header, which nibabel sets to 0
    stored = nibabel.load(file).dataobj  # type: ignore[attr-defined]
    expected = stored.offset + math.prod(stored.shape) * stored.dtype.itemsize
    compressed = file.name.lower().endswith(".gz")
    if not thorough:
        if not compressed:
            return _too_short(file.stat().st_size, expected)
        if _recorded_length(file) == expected % 2**32:
            return None
    try:
        _, length, not_finite = stream_nifti(str(file))
    except EOFError:
        return "the file is cut off"
    except (zlib.error, gzip.BadGzipFile) as error:
        return f"the file is damaged ({error})"
    if not_finite and thorough and not not_finite_is_zero:
        voxels = f"{not_finite} voxel{'s' * (not_finite > 1)}"
        return (
            f"the image holds NaN or infinite values in {voxels}; write numbers in their place, or take them for 0 "
            "with --allow_suspicious"
        )
    return _too_short(length, expected)


def _recorded_length(file: Path) -> int:
    with open(file, "rb") as stream:
        stream.seek(-4, os.SEEK_END)
        return int.from_bytes(stream.read(4), "little")


def _too_short(length: int, expected: int) -> str | None:
    return f"the file is cut off: {length} of {expected} bytes" if length < expected else None
