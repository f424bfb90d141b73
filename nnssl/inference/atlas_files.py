"""Labeled cases that are to be registered: whether their files are sound, and which of them is the scan itself."""

from __future__ import annotations

import filecmp
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnssl.dataset.case_check import CheckRules, check_case, short_path
from nnssl.dataset.parallel import map_cases
from nnssl.dataset.raw import LabeledCase, RawDataset
from nnssl.errors import UserError
from nnssl.inference.cases import InputCase


def check_atlases(
    raw: RawDataset, atlases: Mapping[str, LabeledCase], *, allow_suspicious: bool, num_processes: int
) -> None:
    """Reads the files of all atlases before the first one is registered.

    Raises:
        UserError: naming every file that is missing or unreadable, does not fit the other files of its case, or has
            nothing to register: no contrast, or another dimension than most atlases. ``allow_suspicious`` takes NaN in
            NIfTI files for 0.
    """
    reader = raw.reader_writer_class()
    rules = CheckRules(reader, raw.num_channels, tuple(raw.label_values), raw.ignore_label)
    checks = map_cases(
        _check_atlas,
        {name: (name, *files, rules, allow_suspicious) for name, files in atlases.items()},
        num_processes=num_processes,
        description="Check of labeled cases",
    )
    faults = [f"{name}: {fault}" for name, (found, _) in checks.items() for fault in found]
    dimensions = Counter(dimension for found, dimension in checks.values() if not found)
    for name, (found, dimension) in checks.items():
        if not found and dimension != (usual := dimensions.most_common(1)[0][0]):
            faults.append(f"{name}: {short_path(atlases[name].images[0])} is {dimension}D, most are {usual}D")
    if faults:
        raise UserError(
            "labeled cases cannot be registered",
            where=raw.folder,
            found="".join(f"\n    {fault}" for fault in faults),
            fix="mend them, or name other ones with --atlases",
        )


def _check_atlas(
    name: str, images: list[str], label: str, rules: CheckRules, allow_suspicious: bool
) -> tuple[list[str], int]:
    """Faults of a labeled case, and the dimension of its nonzero region (0 with faults)."""
    refused = {"error"} if allow_suspicious else {"error", "suspicious"}
    facts = check_case("labeled", name, images, label, rules)
    faults = [str(finding) for finding in facts.findings if finding.severity in refused]
    if faults:
        return faults, 0
    channel = crop_to_nonzero(rules.reader_class().read_images(images)[0])[0][0]
    if channel.min() == channel.max():
        return [f"{short_path(images[0])}: {without_contrast(channel)}"], 0
    return [], 2 if channel.shape[0] == 1 else 3


def without_contrast(channel: np.ndarray) -> str:
    """What is wrong with a nonzero region ``(*S)`` whose voxels are all equal."""
    return f"the image has no contrast: every voxel of its nonzero region is {channel.flat[0]:g}"


def own_atlases(cases: Sequence[InputCase], atlases: Mapping[str, LabeledCase]) -> dict[str, tuple[str, ...]]:
    """By the name of each case, the atlases that are the scan itself.

    Their first channels are the same file, behind any links, or have the same content. Names do not matter.
    """
    return {
        case.name: tuple(name for name, (images, _) in atlases.items() if _same_file(images[0], str(case.files[0])))
        for case in cases
    }


def _same_file(one: str, other: str) -> bool:
    return os.path.samefile(one, other) or filecmp.cmp(one, other, shallow=False)
