"""The integrity check of one case, run in a worker process."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from nnssl.dataset.volumes import Geometry, UnusableFile, Volume, read_volume, unread_spacing

Kind = Literal["labeled", "unlabeled", "test"]
Severity = Literal["error", "suspicious", "warning"]
FOLDERS: dict[Kind, str] = {"labeled": "imagesTr", "unlabeled": "imagesUn", "test": "imagesTs"}


@dataclass(frozen=True)
class Finding:
    """One sentence about one file or case.

    Errors stop the way to training, and so does what is suspicious unless it is allowed; warnings are told.
    """

    severity: Severity
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class CheckRules:
    """What every case of the data set is held against."""

    reader_class: type
    num_channels: int
    label_values: tuple[int, ...]
    ignore_label: int | None


@dataclass
class CaseFacts:
    """What the check of one case found; ``content`` is a hash of the voxels of all channels."""

    kind: Kind
    case: str
    findings: list[Finding] = field(default_factory=list)
    content: str | None = None
    dimension: int | None = None
    found_labels: frozenset[int] | None = None

    def error(self, file: str, message: str) -> None:
        """Records an error; of a test case, which training never reads, a warning."""
        self._add("error", file, message)

    def suspicious(self, file: str, message: str) -> None:
        """Records what is a mistake most of the time; of a test case a warning."""
        self._add("suspicious", file, message)

    def warning(self, file: str, message: str) -> None:
        self._add("warning", file, message)

    def _add(self, severity: Severity, file: str, message: str) -> None:
        self.findings.append(Finding("warning" if self.kind == "test" else severity, short_path(file), message))


def short_path(file: str) -> str:
    """Folder and name of a file, enough to find it in a data set."""
    return "/".join(Path(file).parts[-2:])


def check_case(kind: Kind, case: str, images: list[str], label: str | None, rules: CheckRules) -> CaseFacts:
    """Reads every file of one case and compares them with each other and with ``rules``.

    ``label`` is None for unlabeled and test cases: no label of theirs is looked for.
    """
    facts = CaseFacts(kind, case)
    geometry = _check_images(images, rules, facts)
    if label is not None:
        _check_label(label, geometry, rules, facts)
    return facts


def _check_images(images: list[str], rules: CheckRules, facts: CaseFacts) -> Geometry | None:
    """Geometry of the first readable channel; None if no channel can be read."""
    geometry: Geometry | None = None
    channels_per_file: list[int] = []
    hashes: dict[str, str] = {}
    for file in images:
        try:
            volume = read_volume(file, rules.reader_class)
        except UnusableFile as problem:
            facts.error(file, str(problem))
            continue
        array, own = volume.array, volume.geometry
        _check_replaced(volume, file, facts)
        if file == images[0] and (fault := unread_spacing(file, rules.reader_class.__name__)):
            facts.error(file, fault)
        channels_per_file.append(array.shape[0])
        _check_voxels(array, file, facts)
        if not own.is_orthonormal():
            facts.warning(file, "direction of the voxel axes is not orthonormal: distances in mm will be wrong")
        if geometry is None:
            geometry = own
        elif differences := own.differences(geometry):
            facts.error(file, f"differs from the first channel in {', '.join(differences)}")
        if array.min() != array.max():
            content = hashlib.blake2b(repr(array.shape).encode(), digest_size=16)
            content.update(np.ascontiguousarray(array).data)
            hashes[file] = content.hexdigest()
    _check_channels(images, channels_per_file, rules, facts)
    _check_repeated_channels(hashes, facts)
    facts.dimension = geometry.dimension if geometry else None
    if hashes and len(hashes) == len(images):
        facts.content = "".join(hashes.values())
    return geometry


def _check_replaced(volume: Volume, file: str, facts: CaseFacts) -> None:
    if volume.replaced_values:
        facts.suspicious(
            file, f"holds {volume.replaced_values} NaN or infinite values, which nnU-Net's reader takes for 0"
        )


def _check_voxels(array: np.ndarray, file: str, facts: CaseFacts) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        nan = int(np.isnan(array).sum())
        facts.error(
            file,
            f"holds {nan} NaN and {int(finite.size - finite.sum()) - nan} infinite values; replace them in the file",
        )
    elif array.min() == array.max():
        facts.suspicious(file, f"image is constant, every voxel is {array.flat[0]:g}")


def _check_channels(images: list[str], channels_per_file: list[int], rules: CheckRules, facts: CaseFacts) -> None:
    if len(channels_per_file) == len(images) and sum(channels_per_file) != rules.num_channels:
        several = f" ({channels_per_file} per file)" if max(channels_per_file, default=1) > 1 else ""
        facts.error(
            images[0] if images else facts.case,
            f"case has {sum(channels_per_file)} channel(s) in {len(images)} file(s){several}, "
            f"channel_names of dataset.json declares {rules.num_channels}",
        )


def _check_repeated_channels(hashes: dict[str, str], facts: CaseFacts) -> None:
    times = Counter(hashes.values())
    for content, count in times.items():
        if count > 1:
            files = [file for file, own in hashes.items() if own == content]
            facts.warning(files[0], f"the same image is also channel {', '.join(Path(f).name for f in files[1:])}")


def _check_label(label: str, geometry: Geometry | None, rules: CheckRules, facts: CaseFacts) -> None:
    if not Path(label).exists() and not Path(label).is_symlink():
        facts.error(label, "case has no label; a case without label belongs into imagesUn")
        return
    try:
        volume = read_volume(label, rules.reader_class, is_label=True)
    except UnusableFile as problem:
        facts.error(label, str(problem))
        return
    array, own = volume.array, volume.geometry
    _check_replaced(volume, label, facts)
    if array.shape[0] != 1:
        facts.error(label, f"label has {array.shape[0]} channels, it must have one (a color image?)")
        return
    if geometry is not None and (differences := own.differences(geometry)):
        hint = "" if own.shape != geometry.shape else "; if the voxels do match, copy the header of the image"
        facts.error(label, f"label differs from its image in {', '.join(differences)}{hint}")
    values = pd.unique(array.ravel())
    if not np.isfinite(values).all():
        facts.error(label, "label holds NaN or infinite values")
        return
    undeclared = sorted(set(values.tolist()) - set(rules.label_values))
    if undeclared:
        facts.error(label, _undeclared_message(undeclared, rules.label_values))
        return
    facts.found_labels = frozenset(int(value) for value in values)


def _undeclared_message(undeclared: list[float], declared: tuple[int, ...]) -> str:
    shown = _list_numbers(undeclared[:8]) + (", ..." if len(undeclared) > 8 else "")
    hint = "; a mask stored as 0 and 255 must be rewritten as 0 and 1" if undeclared == [255] else ""
    return f"label holds the value(s) {shown}, dataset.json declares {_list_numbers(declared)}{hint}"


def _list_numbers(numbers: Iterable[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)
