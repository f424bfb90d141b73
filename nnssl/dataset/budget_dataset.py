"""Writes a label budget as a raw data set in which the hidden labels do not exist.

Labeled cases get image and label, all others only their image, in ``imagesUn``: no method can see a hidden label by
mistake, because none lies in the data set.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl._version import __version__
from nnssl.dataset.budget import Budget
from nnssl.dataset.groups import GROUPS_FILE, name_some
from nnssl.dataset.source import Source
from nnssl.dataset.splits import SPLITS_FILE, without_groups_of
from nnssl.errors import UserError
from nnssl.utils.files import read_json, write_json
from nnssl.utils.paths import raw_folder

MADE_BY = "nnssl_split"
HIDDEN_LABELS_FILE = "hidden_labels.json"
_HIDDEN_PARTS = ("unlabeled", "test")
_NNUNET_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True)
class BudgetDataset:
    """A data set that was written, and sentences to tell the user about it."""

    folder: Path
    remarks: list[str]


def make_budget_dataset(
    source: Source,
    budget: Budget,
    *,
    dataset_id: int,
    name: str,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
    hidden_labels: str | os.PathLike[str] | None = None,
    copy: bool = False,
    overwrite: bool = False,
) -> BudgetDataset:
    """Writes the raw data set ``DatasetXXX_Name`` below ``$nnUNet_raw``; it appears as a whole or not at all.

    Files are symbolic links to the source (``copy``: copies); labels whose values nnU-Net does not take are written
    anew. ``dataset.json`` gets an entry ``provenance`` (source, ``seed``, case lists). With validation cases,
    ``splits_final.json`` has one fold, labeled cases against validation cases; with ``groups``, ``groups.json`` keeps
    them for later folds.

    Labels of unlabeled and test cases stay at the source, unless a folder ``hidden_labels`` outside nnU-Net's three
    folders is named: it gets ``unlabeled/<case>`` and ``test/<case>``, to evaluate against.

    ``UserError`` if the data set, its id or a filled ``hidden_labels`` folder exists (``overwrite`` replaces those
    that ``nnssl_split`` made, and no others), or if the source lies in what would be replaced. Of a folder
    ``hidden_labels`` only what was written for a data set of this name is replaced; other files in it stay.
    """
    folder = _target_folder(dataset_id, name, overwrite)
    hidden = None if hidden_labels is None else _hidden_folder(Path(hidden_labels), folder.name, overwrite)
    parts = {"unlabeled": budget.unlabeled, "test": budget.test}
    with_label = {part: [case for case in parts[part] if case in source.labels] for part in _HIDDEN_PARTS}
    if hidden is not None:
        _refuse_files_in_the_way(source, with_label, hidden)
    _refuse_own_source(source, [folder] if hidden is None else [folder, *(hidden / part for part in _HIDDEN_PARTS)])
    building = folder.with_name(f".tmp_{folder.name}_{os.getpid()}")
    building.mkdir(parents=True)
    try:
        _write_cases(source, budget, building, copy)
        _write_descriptions(source, budget, building, seed, groups, copy)
        if folder.exists():
            shutil.rmtree(folder)
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    remarks = list(source.remarks)
    if hidden is not None:
        _write_hidden_labels(source, with_label, hidden, folder.name, copy)
        remarks.append(f"Labels of unlabeled and test cases, to evaluate against: {hidden}")
    elif any(with_label.values()):
        remarks.append(
            f"Labels of unlabeled and test cases stay at the source, {source.location}; "
            "--hidden-labels FOLDER collects them to evaluate against."
        )
    return BudgetDataset(folder, remarks + _stale_remarks(folder.name))


def _target_folder(dataset_id: int, name: str, overwrite: bool) -> Path:
    """Folder of the new data set; ``UserError`` if id or name are invalid or taken."""
    if not 1 <= dataset_id <= 999:
        raise UserError("data set id out of range", expected="1 to 999", found=dataset_id)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or re.match(r"Dataset\d", name):
        raise UserError("not a data set name", expected="letters, digits, _ and -, without DatasetXXX_", found=name)
    folder = raw_folder() / f"Dataset{dataset_id:03d}_{name}"
    for variable in _NNUNET_FOLDERS:
        base = os.environ.get(variable)
        others = (
            [path for path in Path(base).glob(f"Dataset{dataset_id:03d}_*") if path.name != folder.name] if base else []
        )
        if others:
            raise UserError(
                f"the id {dataset_id} is taken", found=", ".join(map(str, others)), fix="choose another id with -d"
            )
    if folder.exists():
        if not overwrite:
            raise UserError("the data set exists", where=folder, fix="choose another id or name, or pass --overwrite")
        description = read_json(folder / "dataset.json") if (folder / "dataset.json").is_file() else {}
        if description.get("provenance", {}).get("made_by") != MADE_BY:
            raise UserError(
                "the data set was not made by nnssl_split and is not overwritten",
                where=folder,
                fix="choose another id or name, or move it away yourself",
            )
    return folder


def _hidden_folder(folder: Path, dataset: str, overwrite: bool) -> Path:
    """Absolute folder for hidden labels of a data set.

    ``UserError`` if it lies within nnU-Net's folders, holds files of others only, or labels of another data set.
    """
    folder = Path(os.path.abspath(folder))
    for variable in _NNUNET_FOLDERS:
        base = os.environ.get(variable)
        if base and folder.resolve().is_relative_to(Path(base).resolve()):
            raise UserError(
                f"hidden labels must not lie in ${variable}",
                where=folder,
                fix="name a folder outside nnU-Net's folders",
            )
    if not folder.exists() or not any(folder.iterdir()):
        return folder
    record = _hidden_record(folder)
    owner = record.get("dataset")
    if record and owner != dataset:
        raise UserError(
            "the folder holds the hidden labels of another data set",
            where=folder,
            expected=f"no folder, an empty one, or that of {dataset}",
            found=f"those of {owner}",
            fix="choose another folder for hidden labels",
        )
    if not record or not overwrite:
        fix = "choose another folder" + (" or pass --overwrite" if record else "")
        raise UserError("the folder for hidden labels is not empty", where=folder, fix=fix)
    return folder


def _hidden_record(folder: Path) -> dict[str, Any]:
    """What ``nnssl_split`` wrote about a folder of hidden labels; empty if it did not make it."""
    file = folder / HIDDEN_LABELS_FILE
    record = read_json(file) if file.is_file() else {}
    return record if isinstance(record, dict) and record.get("made_by") == MADE_BY else {}


def _hidden_files(folder: Path, parts: Mapping[str, list[str]], ending: str) -> list[Path]:
    """The label of each case, and where its spacing file would be."""
    kinds = (ending, ".json") if _has_spacing_files(ending) else (ending,)
    names = [(part, case + kind) for part, cases in parts.items() for case in cases for kind in kinds]
    return [folder / part / name for part, name in names if Path(name).name == name]


def _earlier_hidden_files(folder: Path, ending: str) -> list[Path]:
    record = _hidden_record(folder)
    parts = {part: record.get(part, []) for part in _HIDDEN_PARTS}
    return _hidden_files(folder, parts, record.get("file_ending", ending))


def _refuse_files_in_the_way(source: Source, parts: Mapping[str, list[str]], folder: Path) -> None:
    """``UserError`` if a hidden label would replace a file that ``nnssl_split`` did not write."""
    ending = source.dataset_json["file_ending"]
    earlier = set(_earlier_hidden_files(folder, ending))
    foreign = [file for file in _hidden_files(folder, parts, ending) if os.path.lexists(file) and file not in earlier]
    foreign += [folder / part for part in parts if (folder / part).exists() and not (folder / part).is_dir()]
    if foreign:
        raise UserError(
            "files that nnssl_split did not write are in the place of hidden labels",
            where=folder,
            found=name_some(str(file.relative_to(folder)) for file in foreign),
            fix="move them away, or choose another folder for hidden labels",
        )


def _refuse_own_source(source: Source, replaced: Iterable[Path]) -> None:
    """``UserError`` if a file of the source, or a link on the way to it, would be deleted with a folder of before."""
    folders = [folder.resolve() for folder in replaced if folder.exists()]
    files = [file for images in source.images.values() for file in images] + list(source.labels.values())
    for file in [source.location.resolve(), *map(Path, files)] if folders else []:
        for folder in folders:
            if any(place.is_relative_to(folder) for place in _way_to(file)):
                raise UserError(
                    "a data set cannot be made from itself: the source lies in what would be overwritten",
                    where=folder,
                    found=file,
                    fix="choose another id and name, or another folder for hidden labels",
                )


def _way_to(file: Path) -> Iterator[Path]:
    """The file and, if it is a link, what it leads over and to; folders resolved."""
    place = file.absolute()
    while True:
        place = place.parent.resolve() / place.name
        yield place
        if not (place.is_symlink() and place.exists()):
            return
        place = place.parent / place.readlink()


def _write_hidden_labels(
    source: Source, parts: Mapping[str, list[str]], folder: Path, dataset: str, copy: bool
) -> None:
    ending = source.dataset_json["file_ending"]
    for file in _earlier_hidden_files(folder, ending):
        file.unlink(missing_ok=True)
    record = {"made_by": MADE_BY, "dataset": dataset, "file_ending": ending, **parts}
    write_json(record, folder / HIDDEN_LABELS_FILE)
    for part, cases in parts.items():
        (folder / part).mkdir(exist_ok=True)
        for case in cases:
            _place_label(source, case, folder / part, copy)


def _write_cases(source: Source, budget: Budget, folder: Path, copy: bool) -> None:
    for part, cases in (
        ("imagesTr", [*budget.labeled, *budget.validation]),
        ("imagesUn", budget.unlabeled),
        ("imagesTs", budget.test),
    ):
        (folder / part).mkdir()
        for case in cases:
            _place_images(source, case, folder / part, copy)
    (folder / "labelsTr").mkdir()
    for case in [*budget.labeled, *budget.validation]:
        _place_label(source, case, folder / "labelsTr", copy)


def _place_images(source: Source, case: str, folder: Path, copy: bool) -> None:
    ending = source.dataset_json["file_ending"]
    files = source.images[case]
    for channel, file in enumerate(files):
        _place(file, folder / f"{case}_{channel:04d}{ending}", copy)
    _place_spacing_file(_spacing_files(files[0], ending), folder / f"{case}.json", ending, copy)


def _place_label(source: Source, case: str, folder: Path, copy: bool) -> None:
    ending = source.dataset_json["file_ending"]
    file, target = source.labels[case], folder / f"{case}{ending}"
    if source.label_map is None:
        _place(file, target, copy)
    else:
        _rewrite_label(source, file, target)
    # without one of its own, the label lies on the grid of its image
    candidates = [file[: -len(ending)] + ".json", *_spacing_files(source.images[case][0], ending)]
    _place_spacing_file(candidates, folder / f"{case}.json", ending, copy)


def _has_spacing_files(ending: str) -> bool:
    """TIFF has no spacing; nnU-Net reads it from ``<case>.json`` beside the image."""
    return ending.lower() in (".tif", ".tiff")


def _spacing_files(image: str, ending: str) -> list[str]:
    """Where the spacing of an image of the source may be, whose name may have a channel or not."""
    stem = image[: -len(ending)]
    return [stem + ".json", stem[:-5] + ".json"] if re.search(r"_\d{4}$", stem) else [stem + ".json"]


def _place_spacing_file(candidates: list[str], target: Path, ending: str, copy: bool) -> None:
    existing = [file for file in candidates if os.path.isfile(file)]
    if _has_spacing_files(ending) and existing and not target.exists():
        _place(existing[0], target, copy)


def _place(file: str, target: Path, copy: bool) -> None:
    original = Path(file).resolve()
    if copy:
        shutil.copyfile(original, target)
        return
    try:
        target.symlink_to(original)
    except OSError as error:
        raise UserError("cannot make a symbolic link", where=target, found=error, fix="pass --copy") from None


def _rewrite_label(source: Source, file: str, target: Path) -> None:
    assert source.label_map is not None
    reader_writer = source.reader_class()
    stored, properties = reader_writer.read_seg(file)
    translated = np.zeros(stored.shape[1:], dtype=np.uint8)
    for old, new in source.label_map.items():
        translated[stored[0] == old] = new
    # in a folder of its own: a spacing file that the writer puts beside a TIFF is that of the source, placed later
    with tempfile.TemporaryDirectory(prefix=".tmp_", dir=target.parent) as folder:
        written = Path(folder, target.name)
        reader_writer.write_seg(translated, str(written), properties)
        os.replace(written, target)


def _write_descriptions(
    source: Source, budget: Budget, folder: Path, seed: int, groups: Mapping[str, str] | None, copy: bool
) -> None:
    provenance = {
        "made_by": MADE_BY,
        "nnssl_version": __version__,
        "source": str(source.location),
        "seed": seed,
        "files": "copies" if copy else "links",
        "labeled": budget.labeled,
        "validation": budget.validation,
        "unlabeled": budget.unlabeled,
        "test": budget.test,
    }
    number = len(budget.labeled) + len(budget.validation)
    write_json({**source.dataset_json, "numTraining": number, "provenance": provenance}, folder / "dataset.json")
    if budget.validation:
        split = {"train": budget.labeled, "val": budget.validation}
        allowed = without_groups_of(budget.validation, budget.unlabeled, groups)
        if len(allowed) < len(budget.unlabeled):
            split["unlabeled"] = allowed
        write_json([split], folder / SPLITS_FILE)
    if groups:
        members = sorted({*budget.labeled, *budget.validation, *budget.unlabeled, *budget.test} & set(groups))
        write_json({case: groups[case] for case in members}, folder / GROUPS_FILE)


def _stale_remarks(name: str) -> list[str]:
    bases = [os.environ.get(variable) for variable in ("nnUNet_preprocessed", "nnUNet_results")]
    stale = [str(Path(base) / name) for base in bases if base and (Path(base) / name).exists()]
    if not stale:
        return []
    return [f"Made from an earlier data set of this name, delete before going on: {', '.join(stale)}"]
