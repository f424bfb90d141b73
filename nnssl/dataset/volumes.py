"""One image or label file: its voxels and its place in space, or one sentence why it cannot be used."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import math
import os
import re
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# label and image may lie this far apart, in voxels of the finer axis: headers round, misplaced labels are far off
PLACE_TOLERANCE = 0.1
# deviation of the axes' scalar products from 0 and 1 up to which a direction counts as orthonormal
ORTHONORMAL_TOLERANCE = 1e-3
_CHUNK = 1 << 20


class UnusableFile(Exception):
    """A file that cannot be read, or that nnU-Net would read as something else; the text says why."""


@dataclass(frozen=True)
class Geometry:
    """Grid of a volume. ``shape`` and ``spacing`` in mm are in array order; a 2D image has a first axis of length 1.

    ``affine`` maps voxel indices in file order (x, y, z) to mm; None for formats without a position (PNG, TIFF).
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    affine: np.ndarray | None
    dimension: int

    def differences(self, expected: Geometry) -> list[str]:
        """What differs from ``expected``, each with both values; empty if the two grids agree."""
        if self.shape != expected.shape:
            return [f"shape {self.shape} instead of {expected.shape}"]
        found = []
        # nnU-Net refuses channels whose spacings np.allclose tells apart
        if len(self.spacing) != len(expected.spacing) or not np.allclose(self.spacing, expected.spacing):
            found.append(f"spacing {_round(self.spacing)} instead of {_round(expected.spacing)} mm")
        elif self.affine is not None and expected.affine is not None:
            apart = _corner_distance(self, expected)
            if apart > PLACE_TOLERANCE * min(self._affine_spacing()):
                if not np.allclose(self.direction(), expected.direction(), atol=1e-3):
                    both = f"{_round(self.direction().ravel())} instead of {_round(expected.direction().ravel())}"
                    found.append(f"direction {both}")
                if not np.allclose(self.origin(), expected.origin(), rtol=0, atol=1e-3):
                    found.append(f"origin {_round(self.origin())} instead of {_round(expected.origin())} mm")
                found.append(f"position, with corners up to {apart:.3g} mm apart")
        return found

    def is_orthonormal(self) -> bool:
        """False for sheared axes, for which distances in mm are wrong."""
        if self.affine is None:
            return True
        direction = self.direction()
        return np.allclose(direction.T @ direction, np.eye(len(direction)), atol=ORTHONORMAL_TOLERANCE)

    def direction(self) -> np.ndarray:
        """Unit vectors of the voxel axes in columns, (d, d)."""
        assert self.affine is not None
        return self.affine[:-1, :-1] / self._affine_spacing()

    def origin(self) -> np.ndarray:
        """Position of the first voxel in mm, (d,)."""
        assert self.affine is not None
        return self.affine[:-1, -1]

    def _affine_spacing(self) -> np.ndarray:
        assert self.affine is not None
        return np.linalg.norm(self.affine[:-1, :-1], axis=0)


@dataclass(frozen=True)
class Volume:
    """``array`` (channels, *shape) as nnU-Net sees it, and how many NaN or infinite values the reader made 0."""

    array: np.ndarray
    geometry: Geometry
    replaced_values: int


def read_volume(file: str, reader_class: type, *, is_label: bool = False) -> Volume:
    """Reads one file with nnU-Net's reader.

    ``UnusableFile`` if the file is missing, empty, truncated, unreadable, has more than three dimensions or no valid
    spacing.
    """
    nonfinite = _check_on_disk(file)
    reader = reader_class()
    try:
        # the readers print what the caller reports; one file at a time, so that each problem has its file
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            # else the imaginary parts of complex images would be lost
            warnings.simplefilter("error", getattr(np, "exceptions", np).ComplexWarning)
            array, properties = reader.read_seg(file) if is_label else reader.read_images([file])
    except Exception as error:
        raise UnusableFile(_reason(error)) from error
    kept = int(array.size - np.isfinite(array).sum()) if nonfinite else 0
    return Volume(array, _geometry(array, properties), nonfinite - kept)


def direction_of(properties: dict[str, Any]) -> np.ndarray | None:
    """Unit vectors of the voxel axes in columns, (d, d), by the properties that nnU-Net's reader returns.

    Axes are in file order (x, y, z), which is that of the array reversed. None for formats without one (PNG, TIFF).
    """
    affine = _affine(properties)
    if affine is None:
        return None
    axes = affine[:-1, :-1]
    lengths = np.linalg.norm(axes, axis=0)
    return axes / lengths if np.isfinite(axes).all() and lengths.all() else None


def unread_spacing(image: str | os.PathLike[str], reader: str) -> str | None:
    """Why the spacing file of an image would not be read, or would be that of another one; None if all is well.

    Args:
        image: of a case, with or without channel in its name.
        reader: name of nnU-Net's reader. That of 3D TIFF takes the last five characters of a name for the channel and
            reads ``<case>.json``, or takes 1 mm without a word.
    """
    if reader != "Tiff3DIO":
        return None
    path = Path(image)
    numbered = re.search(r"_\d{4}$", path.stem)
    read, own = path.with_name(path.stem[:-5] + ".json"), path.with_name(path.stem + ".json")
    rename = f"rename the image to {path.stem}_0000{path.suffix}"
    if numbered and not read.is_file() and own.is_file():
        fix = f"rename it to {read.name}" if path.stem.endswith("_0000") else rename
        return f"nnU-Net looks for the spacing in {read.name}, not in {own.name}, and would take 1 mm; {fix}"
    if not numbered and (read.is_file() or own.is_file()):
        taken = f"that in {read.name}" if read.is_file() else "1 mm"
        return f"without a channel in its name, nnU-Net does not find its spacing and would take {taken}; {rename}"
    return None


def _check_on_disk(file: str) -> int:
    """Number of NaN and infinite values of a NIfTI file, otherwise 0; ``UnusableFile`` if the file is not whole."""
    path = Path(file)
    if path.is_symlink() and not path.exists():
        raise UnusableFile(f"is a link to {os.readlink(path)}, which does not exist")
    if not path.is_file():
        raise UnusableFile("file not found")
    if path.stat().st_size == 0:
        raise UnusableFile("file is empty (0 bytes)")
    if not file.lower().endswith((".nii", ".nii.gz")):
        return 0
    try:
        return _check_nifti(file)
    except UnusableFile:
        raise
    except Exception as error:
        raise UnusableFile(_reason(error)) from error


def _check_nifti(file: str) -> int:
    """Finds what the readers pass over and returns the number of NaN and infinite voxels.

    SimpleITK fills truncated files up, and replaces a spacing of 0 by 1 mm and NaN by 0.
    """
    try:
        header, found, nonfinite = stream_nifti(file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnusableFile(f"file is truncated or damaged: {error}") from error
    zooms = [float(zoom) for zoom in header.get_zooms()[:3]]
    if not all(math.isfinite(zoom) and zoom != 0 for zoom in zooms):
        raise UnusableFile(f"voxel spacing in the header is zero or not a number: {tuple(zooms)}")
    voxels = math.prod(header.get_data_shape())
    expected = int(header.get_data_offset()) + voxels * header.get_data_dtype().itemsize
    if found < expected:
        raise UnusableFile(f"file is truncated: {found} of {expected} bytes")
    return nonfinite


def stream_nifti(file: str) -> tuple[Any, int, int]:
    """Header, number of bytes after decompression, and number of NaN and infinite voxels, read once.

    ``EOFError``, ``zlib.error`` or ``gzip.BadGzipFile`` if compressed data are cut off or damaged, ``UnusableFile`` if
    it is no NIfTI file.
    """
    opener: Any = gzip.open if file.lower().endswith(".gz") else open
    size, nonfinite, rest = 0, 0, b""
    with opener(file, "rb") as stream:
        chunk = stream.read(_CHUNK)
        header = _nifti_header(chunk)
        dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
        end = offset + math.prod(header.get_data_shape()) * dtype.itemsize
        while chunk:
            if dtype.kind in "fc":
                data = rest + chunk[max(offset - size, 0) : max(end - size, 0)]
                whole = len(data) // dtype.itemsize
                nonfinite += whole - int(np.isfinite(np.frombuffer(data, dtype, whole)).sum())
                rest = data[whole * dtype.itemsize :]
            size += len(chunk)
            chunk = stream.read(_CHUNK)
    return header, size, nonfinite


def _nifti_header(start: bytes) -> Any:
    import nibabel

    # the first number is the size of the header, and tells version and byte order
    sizes = {int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")}
    header_class: Any = nibabel.Nifti2Header if nibabel.Nifti2Header.sizeof_hdr in sizes else nibabel.Nifti1Header
    if header_class.sizeof_hdr not in sizes:
        raise UnusableFile("cannot be read: not a NIfTI file")
    # unchecked: the check would mend what is to be found here
    return header_class(start[: header_class.sizeof_hdr], check=False)


def _reason(error: Exception) -> str:
    text = str(error)
    if "orthonormal" in text:
        return "direction of the voxel axes is not orthonormal (sheared), SimpleITK does not read it"
    # SimpleITK puts its source location first and the cause last
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = re.sub(r"^(ITK|sitk::)\s*ERROR:\s*", "", lines[-1]) if lines else ""
    return f"cannot be read: {cause or type(error).__name__}"


def _geometry(array: np.ndarray, properties: dict[str, Any]) -> Geometry:
    spacing = tuple(float(s) for s in properties["spacing"])
    itk = properties.get("sitk_stuff")
    dimension = 2 if array.shape[1] == 1 and (itk is None or len(itk["spacing"]) == 2) else 3
    if itk is not None and (len(itk["spacing"]) not in (2, 3) or array.shape[0] != 1 or len(spacing) != 3):
        stored = "x".join(map(str, array.shape))
        raise UnusableFile(f"is not one 2D or 3D scalar image ({stored}): write one file per channel or time point")
    if not all(math.isfinite(s) and s > 0 for s in spacing):
        raise UnusableFile(f"voxel spacing is not positive: {spacing}")
    return Geometry(tuple(array.shape[1:]), spacing, _affine(properties), dimension)


def _affine(properties: dict[str, Any]) -> np.ndarray | None:
    if "sitk_stuff" in properties:
        itk = properties["sitk_stuff"]
        d = len(itk["spacing"])
        affine = np.eye(d + 1)
        affine[:d, :d] = np.reshape(itk["direction"], (d, d)) * np.asarray(itk["spacing"])
        affine[:d, d] = itk["origin"]
        return affine
    if "nibabel_stuff" in properties:
        stored = properties["nibabel_stuff"]
        return np.asarray(stored.get("reoriented_affine", stored["original_affine"]), dtype=float)
    return None


def _corner_distance(a: Geometry, b: Geometry) -> float:
    """Largest distance in mm between the positions of the same corner voxel in two grids of one shape."""
    assert a.affine is not None
    assert b.affine is not None
    if a.affine.shape != b.affine.shape:
        return math.inf
    d = len(a.affine) - 1
    last = [size - 1 for size in a.shape[::-1][:d]]
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, end) for end in last))], dtype=float)
    return float(np.linalg.norm(corners @ (a.affine - b.affine).T, axis=1).max())


def _round(values: Any) -> tuple[float, ...]:
    return tuple(float(f"{float(value):.5g}") for value in values)
