"""Folds: which labeled cases train, which validate, and which unlabeled cases may be seen meanwhile.

``splits_final.json`` is nnU-Net's: a list with one entry per fold, ``{"train": [...], "val": [...]}``. An entry may
have a third list, ``"unlabeled"``, which stock nnU-Net ignores; without it all unlabeled cases are used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.dataset.groups import group_cases, load_groups, name_some
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.utils.files import read_json, write_json

SPLITS_FILE = "splits_final.json"
_REMAKE = "correct the file, or delete it and run nnssl_plan_and_preprocess again to make new folds"

Split = dict[str, list[str]]


@dataclass(frozen=True)
class Fold:
    """Cases of one fold."""

    train: list[str]
    val: list[str]
    unlabeled: list[str]


def make_splits(
    labeled_cases: Iterable[str],
    unlabeled_cases: Iterable[str],
    groups: Mapping[str, str] | None = None,
    n_splits: int = 5,
    seed: int = 12345,
) -> list[Split]:
    """Cross-validation folds of the labeled cases.

    nnU-Net's own split (identical for ungrouped cases); with fewer labeled cases than ``n_splits``, one case is left
    out per fold; with a single one there is nothing to validate on and the list is empty (train fold ``all``).

    With ``groups`` (case -> group) all this is done with whole groups, and unlabeled cases that belong to a group of
    the validation cases are left out of that fold's ``"unlabeled"``, which is present only then.
    """
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    units = group_cases(labeled_cases, groups)
    unlabeled = sorted(unlabeled_cases)
    if len(units) < 2:
        return []
    # the split depends on the number of units only, so numbers can stand for them
    folds = generate_crossval_split(list(range(len(units))), seed=seed, n_splits=min(n_splits, len(units)))
    splits = []
    for fold in folds:
        split: Split = {key: sorted(case for unit in fold[key] for case in units[unit]) for key in ("train", "val")}
        allowed = without_groups_of(split["val"], unlabeled, groups)
        if len(allowed) < len(unlabeled):
            split["unlabeled"] = allowed
        splits.append(split)
    return splits


def without_groups_of(held_out: Iterable[str], cases: Iterable[str], groups: Mapping[str, str] | None) -> list[str]:
    """The ``cases`` that share no group with a held-out case, in their order."""
    if not groups:
        return list(cases)
    forbidden = {groups[case] for case in held_out if case in groups}
    return [case for case in cases if groups.get(case) not in forbidden]


def load_fold(
    splits_file: str | Path, fold: int | str, labeled_cases: Iterable[str], unlabeled_cases: Iterable[str]
) -> Fold:
    """The cases of one fold, validated against the cases that exist.

    Fold ``"all"`` needs no file: as in nnU-Net, all labeled cases train and the same ones validate (so that its
    validation score says nothing about new cases), with all unlabeled cases.

    ``UserError`` if the fold does not exist (nnU-Net would make a random one), names a case that does not exist, has
    no training or no validation case, or trains on a validation case.
    """
    labeled, unlabeled = sorted(labeled_cases), sorted(unlabeled_cases)
    if fold == "all":
        return Fold(labeled, list(labeled), unlabeled)
    if not str(fold).isdigit():
        raise UserError("not a fold", found=fold, expected="a number from 0, or all")
    path = Path(splits_file)
    if not path.is_file():
        if len(labeled) < 2:
            raise UserError(f"there is no fold {fold}: one labeled case leaves none to validate on", fix="use fold all")
        raise UserError(
            f"there is no fold {fold}: no folds were made",
            where=path,
            expected="labeled cases of at least two patients (groups): one case or patient leaves none to validate on",
            found=f"{len(labeled)} labeled cases",
            fix="use fold all, or, if they are of several patients, run nnssl_plan_and_preprocess",
        )
    splits = _read_splits(path)
    if int(fold) >= len(splits):
        raise UserError(
            f"there is no fold {fold}",
            where=path,
            expected=", ".join([*map(str, range(len(splits))), "all"]),
            fix="use one of these, or add the fold to the file",
        )
    split = splits[int(fold)]
    _validate_split(split, f"{path}, fold {fold}", set(labeled), set(unlabeled))
    return Fold(list(split["train"]), list(split["val"]), list(split.get("unlabeled", unlabeled)))


def ensure_splits(
    raw: RawDataset, preprocessed_dataset_folder: str | Path, groups: Mapping[str, str] | None = None
) -> list[str]:
    """Sees to it that ``splits_final.json`` lies in the preprocessed folder of the data set; returns what to tell.

    An existing file is validated and kept. Otherwise the file of the raw data set folder is validated and copied (as
    nnU-Net does), and without one :func:`make_splits` makes the folds, with ``groups`` or those of ``groups.json``.
    With one labeled case (or group) no file is written: only fold ``all`` can be trained.

    Returns sentences for the user, among them which cases are in no fold because they were added later.

    ``UserError`` if a file is invalid, if the raw folder holds other folds than the preprocessed one, or if a kept
    file lets a group straddle training and validation.
    """
    target = Path(preprocessed_dataset_folder) / SPLITS_FILE
    given = raw.folder / SPLITS_FILE
    groups = load_groups(raw) if groups is None else groups
    given_splits = _read_splits(given) if given.is_file() else None
    if target.is_file():
        splits = _read_splits(target)
        if given_splits is not None and splits[: len(given_splits)] != given_splits:
            raise UserError(
                f"the raw and the preprocessed folder hold different folds in {SPLITS_FILE}",
                where=f"{given} and {target}",
                fix="delete the one that does not count",
            )
        path = target
    elif given_splits is not None:
        splits, path = given_splits, given
    else:
        splits = make_splits(raw.labeled, raw.unlabeled, groups)
        if not splits:
            return ["One labeled case (or group) leaves none to validate on: train with fold all."]
        write_json(splits, target)
        few = "" if len(splits) >= 5 else " (one case or group left out per fold)"
        return [f"Made {len(splits)} folds{few}: {target}"]
    for number, split in enumerate(splits):
        where = f"{path}, fold {number}"
        _validate_split(split, where, set(raw.labeled), set(raw.unlabeled))
        _validate_groups(split, where, raw, groups)
    if path == given:
        write_json(splits, target)
    return [f"Folds of {path} are used ({len(splits)}).", *_tell_cases_in_no_fold(splits, path, raw)]


def _tell_cases_in_no_fold(splits: list[Split], path: Path, raw: RawDataset) -> list[str]:
    sentences = []
    used = {case for split in splits for case in (*split["train"], *split["val"])}
    left_out = [case for case in raw.labeled if case not in used]
    if left_out:
        sentences.append(
            f"{len(left_out)} labeled case(s) are in no fold: {name_some(left_out)}; add them to {path}, "
            "or delete the file and run again to make new folds."
        )
    if splits and all("unlabeled" in split for split in splits):
        listed = {case for split in splits for case in split["unlabeled"]}
        unused = [case for case in raw.unlabeled if case not in listed]
        if unused:
            sentences.append(
                f'{len(unused)} unlabeled case(s) are in no "unlabeled" list: {name_some(unused)}; see {path}.'
            )
    return sentences


def _read_splits(path: Path) -> list[Split]:
    splits = read_json(path, fix=_REMAKE)
    if not isinstance(splits, list):
        raise UserError(
            "folds are not a list", where=path, expected='[{"train": [...], "val": [...]}, ...]', fix=_REMAKE
        )
    for number, split in enumerate(splits):
        keys = ("train", "val", "unlabeled") if isinstance(split, dict) and "unlabeled" in split else ("train", "val")
        if not isinstance(split, dict) or not all(_is_case_list(split.get(key)) for key in keys):
            raise UserError(
                "a fold lacks its lists of case names",
                where=f"{path}, fold {number}",
                expected='{"train": [...], "val": [...]} and optionally "unlabeled"',
                fix=_REMAKE,
            )
    return splits


def _is_case_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(case, str) for case in value)


def _validate_split(split: Split, where: str, labeled: set[str], unlabeled: set[str]) -> None:
    for key, existing in (("train", labeled), ("val", labeled), ("unlabeled", unlabeled)):
        cases = split.get(key, [])
        unknown = sorted(set(cases) - existing)
        if unknown:
            kind = "unlabeled" if key == "unlabeled" else "labeled"
            raise UserError(
                f'the fold names cases under "{key}" that are not {kind} cases of the data set',
                where=where,
                found=name_some(unknown),
                fix=_REMAKE,
            )
        repeated = sorted(case for case, times in Counter(cases).items() if times > 1)
        if repeated:
            raise UserError(f'"{key}" of the fold repeats cases', where=where, found=name_some(repeated), fix=_REMAKE)
    overlap = sorted(set(split["train"]) & set(split["val"]))
    if overlap:
        raise UserError(
            "the fold validates on training cases",
            where=where,
            found=name_some(overlap),
            fix="take them out of one list; to train and validate on all cases use fold all",
        )
    for key in ("train", "val"):
        if not split[key]:
            raise UserError(f'"{key}" of the fold is empty', where=where, fix="to train on all cases use fold all")


def _validate_groups(split: Split, where: str, raw: RawDataset, groups: Mapping[str, str] | None) -> None:
    seen = [*split["train"], *split.get("unlabeled", raw.unlabeled)]
    allowed = set(without_groups_of(split["val"], seen, groups))
    straddling = [case for case in seen if case not in allowed]
    if straddling:
        raise UserError(
            "the fold sees cases of the groups (patients) that it validates on",
            where=where,
            found=name_some(straddling),
            fix='move them; unlabeled cases are left out by listing the others under "unlabeled"',
        )
