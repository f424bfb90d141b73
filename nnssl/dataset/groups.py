"""Groups: cases that belong together, usually the scans of one patient, and must not straddle a split."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.utils.files import read_json

GROUPS_FILE = "groups.json"


def load_groups(raw: RawDataset) -> dict[str, str] | None:
    """``{case: group}`` of ``groups.json`` in the raw data set folder; None if there is no such file.

    Cases that the file does not name are groups of their own. ``UserError`` if it names cases that do not exist: a
    misspelled case would silently be ungrouped.
    """
    return source_groups(raw.folder, {*raw.labeled, *raw.unlabeled, *raw.test})


def read_groups(path: str | Path, cases: Iterable[str]) -> dict[str, str]:
    """``{case: group}`` of a JSON file; ``UserError`` if it is no such mapping or names a case not in ``cases``."""
    groups = read_json(path)
    if not isinstance(groups, dict) or not all(isinstance(group, (str, int)) for group in groups.values()):
        raise UserError("groups file is not an object", where=path, expected='{"case": "patient", ...}')
    unknown = sorted(set(groups) - set(cases))
    if unknown:
        raise UserError(
            "groups file names cases that do not exist",
            where=path,
            found=name_some(unknown),
            fix="correct the case names (file names without channel and ending)",
        )
    return {case: str(group) for case, group in groups.items()}


def groups_from_regex(cases: Iterable[str], pattern: str) -> dict[str, str]:
    r"""``{case: group}`` where the first group of ``pattern``, matched at the start of the case name, is the group.

    ``UserError`` if the pattern is invalid, has no group or does not match every case.

    >>> groups_from_regex(["patient002_frame01", "patient002_frame02"], r"(patient\d+)_")
    {'patient002_frame01': 'patient002', 'patient002_frame02': 'patient002'}
    """
    try:
        rule = re.compile(pattern)
    except re.error as error:
        raise UserError("invalid regular expression for groups", found=pattern, fix=str(error)) from None
    if rule.groups < 1:
        raise UserError(
            "regular expression for groups has no group", found=pattern, expected=r"such as (patient\d+)_frame\d+"
        )
    groups = {}
    without = []
    for case in cases:
        match = rule.match(case)
        if match and match.group(1):
            groups[case] = match.group(1)
        else:
            without.append(case)
    if without:
        raise UserError(
            "regular expression for groups does not match every case",
            expected=f"a match of {pattern} at the start of the case name",
            found=name_some(without),
        )
    return groups


def source_groups(
    folder: Path,
    cases: Iterable[str],
    groups_file: str | Path | None = None,
    pattern: str | None = None,
    left_out: Iterable[str] = (),
) -> dict[str, str] | None:
    """Groups of ``cases`` by a regular expression or a file, or else by the ``groups.json`` of ``folder``, if any.

    A file may name cases that are ``left_out``, too.
    """
    if pattern is not None:
        return groups_from_regex(cases, pattern)
    if groups_file is None and (folder / GROUPS_FILE).is_file():
        groups_file = folder / GROUPS_FILE
    if groups_file is None:
        return None
    left_out = set(left_out)
    groups = read_groups(groups_file, {*cases, *left_out})
    return {case: group for case, group in groups.items() if case not in left_out}


def group_cases(cases: Iterable[str], groups: Mapping[str, str] | None) -> list[list[str]]:
    """The cases, sorted, as lists of those that belong together; without a group a case stands alone.

    The lists are ordered by their first case.
    """
    together: dict[tuple[bool, str], list[str]] = {}
    for case in sorted(cases):
        # the flag keeps a case apart from a group that happens to have its name
        key = (True, groups[case]) if groups and case in groups else (False, case)
        together.setdefault(key, []).append(case)
    return list(together.values())


def refuse_repeated(flag: str, names: Iterable[str]) -> None:
    """``UserError`` if a list of names given with ``flag`` holds one twice: another was meant, most likely."""
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise UserError(
            f"the same name twice in {flag}",
            found=name_some(twice),
            fix="name it once, or correct it if another one is meant",
        )


def name_some(names: Iterable[str], limit: int = 8) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
