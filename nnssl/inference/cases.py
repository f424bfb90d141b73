"""The scans to segment: which files make a case, and whether they can be read, before anything heavy is loaded."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl.dataset.volumes import unread_spacing
from nnssl.errors import UserError
from nnssl.inference.completeness import is_nifti, nifti_fault

_IMAGE_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".gipl", ".tif", ".tiff", ".png", ".bmp", ".jpg", ".dcm")
_SHOWN = 10


@dataclass(frozen=True)
class InputCase:
    """A case to segment: ``name`` is the name of the mask, ``files`` are its images in the order of the channels."""

    name: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Header:
    """Number of channels in a file and its size in voxels, in the order of the file's array."""

    channels: int
    shape: tuple[int, ...]


def collect_cases(
    inputs: Sequence[str | os.PathLike[str]], *, file_ending: str, channels: int, reader: str
) -> list[InputCase]:
    """The cases in folders and single files, sorted by name.

    Files are named as in nnU-Net, ``<case>_0000.nii.gz`` with the number of the channel. Where one file holds all
    channels of the model, files without the number are accepted too; the case then has the name of the file.
    Only the headers are read.

    Args:
        inputs: folders (searched without subfolders) or files.
        file_ending: the model's, such as ``.nii.gz``.
        channels: image channels that the model expects.
        reader: name of nnU-Net's reader in the plans, such as ``SimpleITKIO``.

    Raises:
        UserError: for missing or unreadable files, wrong endings, missing or additional channels, channels of
            different size, names that could be read in two ways, and spacing files that would not be read.
    """
    files = _find_files([Path(i) for i in inputs], file_ending)
    headers = _read_headers(files, reader)
    groups = _group(files, headers, file_ending, channels)
    problems = [text for name, numbered in groups.items() if (text := _fault(name, numbered, headers, channels))]
    if problems:
        raise UserError(
            "the input does not fit the model",
            where=f"{len(problems)} of {len(groups)} cases",
            expected=f"{channels} channel{'s' * (channels > 1)} per case, as <case>_0000{file_ending}"
            + (f" to <case>_{channels - 1:04d}{file_ending}" if channels > 1 else ""),
            found=_listed(problems),
        )
    unread = [f"{file.name}: {fault}" for file in files if (fault := unread_spacing(file, reader))]
    if unread:
        raise UserError("the spacing of images would not be read", where=files[0].parent, found=_listed(unread))
    return [InputCase(name, tuple(groups[name][i] for i in sorted(groups[name]))) for name in sorted(groups)]


def previous_stage_files(
    cases: Iterable[InputCase], folder: str | os.PathLike[str] | None, *, file_ending: str, stage: str
) -> list[Path]:
    """Masks of the previous stage of a cascade, one per case.

    Raises:
        UserError: if the folder is not given or lacks masks.
    """
    fix = f"predict the cases with configuration {stage} first and name the folder with -prev_stage_predictions"
    if folder is None:
        raise UserError("the model is the second stage of a cascade and needs the masks of the first", fix=fix)
    paths = [Path(folder) / f"{case.name}{file_ending}" for case in cases]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError("masks of the previous stage are missing", where=folder, expected=_listed(missing), fix=fix)
    return paths


def _find_files(inputs: Sequence[Path], file_ending: str) -> list[Path]:
    found: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found += _files_of_folder(path, file_ending)
        elif not path.exists():
            raise UserError("input not found", where=path, found=_lost_link(path))
        elif not path.name.endswith(file_ending):
            raise UserError("wrong file ending", where=path, expected=f"{file_ending}, as in the training data")
        else:
            found.append(path)
    if not found:
        raise UserError("no input is named", expected="a folder of images, or image files")
    return sorted(dict.fromkeys(found))


def _files_of_folder(folder: Path, file_ending: str) -> list[Path]:
    # names with a leading dot are not scans: macOS puts ._<name> beside every file on foreign drives
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    # a link that leads nowhere is not left out without a word: `_read_headers` names it
    files = [entry for entry in entries if entry.is_file() or _lost_link(entry)]
    matching = [file for file in files if file.name.endswith(file_ending)]
    other = [f.name for f in files if f not in matching and f.name.lower().endswith(_IMAGE_ENDINGS)]
    if other:
        raise UserError(
            "images with another file ending than the training data",
            where=folder,
            expected=file_ending,
            found=_listed(other),
            fix="convert them, or move them elsewhere if they are not to be segmented",
        )
    if not matching:
        subfolders = sum(entry.is_dir() for entry in entries)
        held = f"{len(files)} other files, {subfolders} subfolders (not searched)" if entries else "an empty folder"
        raise UserError("no images in the input folder", where=folder, expected=f"files *{file_ending}", found=held)
    return matching


def _lost_link(path: Path) -> str | None:
    """What a link points to that does not exist; None for everything else."""
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which does not exist"
    return None


def _read_headers(files: Sequence[Path], reader: str) -> dict[Path, Header]:
    read = _header_reader(reader)
    headers, unreadable = {}, []
    for file in files:
        try:
            if lost := _lost_link(file):
                raise ValueError(lost)
            headers[file] = read(file)
            if is_nifti(file) and (fault := nifti_fault(file, thorough=False)):
                raise ValueError(fault)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
            unreadable.append(f"{file}: {reason}")
    if unreadable:
        raise UserError(
            f"{len(unreadable)} of {len(files)} images cannot be read",
            found=_listed(unreadable),
            fix="repair or remove them",
        )
    return headers


def _header_reader(reader: str) -> Callable[[Path], Header]:
    if reader in ("SimpleITKIO", "SimpleITKIOWithReorient"):
        return _sitk_header
    if reader in ("NibabelIO", "NibabelIOWithReorient"):
        return _nibabel_header
    if reader == "Tiff3DIO":
        return _tiff_header
    from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name

    try:
        instance = recursive_find_reader_writer_by_name(reader)()
    except RuntimeError:
        raise UserError("the plans name an image reader that nnU-Net does not have", found=reader) from None

    def read_whole(file: Path) -> Header:
        shape = instance.read_images([str(file)])[0].shape
        return Header(shape[0], tuple(shape[1:]))

    return read_whole


def _sitk_header(file: Path) -> Header:
    import SimpleITK as sitk

    image = sitk.ImageFileReader()
    image.SetFileName(str(file))
    image.ReadImageInformation()
    if image.GetNumberOfComponents() > 1:
        raise ValueError(f"{image.GetNumberOfComponents()} values per voxel; store each channel in a file of its own")
    size = image.GetSize()
    if len(size) == 4:
        return Header(size[3], tuple(size[2::-1]))
    return Header(1, tuple(size[::-1]))


def _nibabel_header(file: Path) -> Header:
    import nibabel

    shape = nibabel.load(file).shape  # type: ignore[attr-defined]
    if len(shape) != 3:
        raise ValueError(f"{len(shape)} dimensions; 3 are expected")
    return Header(1, tuple(shape[::-1]))


def _tiff_header(file: Path) -> Header:
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        shape = tiff.series[0].shape
    if len(shape) != 3:
        raise ValueError(f"{len(shape)} dimensions; 3 are expected")
    return Header(1, tuple(shape))


def _group(
    files: Sequence[Path], headers: Mapping[Path, Header], file_ending: str, channels: int
) -> dict[str, dict[int, Path]]:
    """Files by case and channel number."""
    stems = {file: file.name.removesuffix(file_ending) for file in files}
    numbered = {file: match for file, stem in stems.items() if (match := re.fullmatch(r"(.+)_(\d{4})", stem))}
    plain = [file for file in files if file not in numbered]
    first_channels = [file for file, match in numbered.items() if match[2] == "0000"]
    one_file_per_case = all(header.channels == channels for header in headers.values())
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    if one_file_per_case and not first_channels and not _one_later_channel(numbered.values(), files):
        placed = [(stem, 0, file) for file, stem in stems.items()]
    elif plain:
        raise UserError(
            "file names without the number of the channel"
            + (", beside names that have it" if numbered else f", but the model has {channels} channels"),
            found=_listed([file.name for file in plain]),
            expected=f"<case>_0000{file_ending}, <case>_0001{file_ending}, ...",
            fix="rename them",
        )
    else:
        placed = [(match[1], int(match[2]), file) for file, match in numbered.items()]
    for name, channel, file in placed:
        if channel in groups[name]:
            raise UserError("two files for the same case", where=name, found=f"{groups[name][channel]} and {file}")
        groups[name][channel] = file
    return dict(groups)


def _one_later_channel(matches: Iterable[re.Match[str]], files: Sequence[Path]) -> bool:
    """Whether all files look like channel 1 (or 2, ...) of several cases, whose channel 0 is missing."""
    found = list(matches)
    return len(found) == len(files) > 1 and len({match[2] for match in found}) == 1


def _fault(name: str, numbered: Mapping[int, Path], headers: Mapping[Path, Header], channels: int) -> str | None:
    held = sum(headers[file].channels for file in numbered.values())
    if sorted(numbered) != list(range(len(numbered))) or held != channels:
        files = ", ".join(file.name for _, file in sorted(numbered.items()))
        return f"case {name}: {held} channel{'s' * (held != 1)} in {files}"
    shapes = {headers[file].shape for file in numbered.values()}
    if len(shapes) > 1:
        sizes = ", ".join(f"{file.name} {headers[file].shape}" for _, file in sorted(numbered.items()))
        return f"case {name}: channels of different size, {sizes}"
    return None


def _listed(items: Sequence[str]) -> str:
    more = [f"... and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return "".join(f"\n    {item}" for item in [*items[:_SHOWN], *more])
