"""Where a label budget comes from: a fully labeled folder, or an existing nnU-Net raw data set."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.dataset.groups import name_some
from nnssl.dataset.parallel import map_cases
from nnssl.dataset.raw import RawDataset, declared_values, validate_labels
from nnssl.dataset.volumes import UnusableFile, read_volume
from nnssl.errors import UserError
from nnssl.utils.files import read_json


@dataclass(frozen=True)
class Source:
    """Images and labels that a label budget is drawn from.

    ``images`` has every case, ``labels`` those with a label file. ``pool`` are the cases to draw from (all have a
    label), ``test`` those of the source's own test part, ``unlabeled`` those that never had a label. ``dataset_json``
    lacks only ``numTraining``. ``label_map`` translates label values that nnU-Net does not take (masks of 0 and 255);
    None: the files are used as they are. ``remarks`` are sentences for the user. ``left_out`` are further cases that
    play no part.
    """

    location: Path
    dataset_json: dict[str, Any]
    images: dict[str, list[str]]
    labels: dict[str, str]
    pool: list[str]
    test: list[str]
    unlabeled: list[str]
    reader_class: type
    label_map: dict[int, int] | None = None
    remarks: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def open_source(
    source: str | os.PathLike[str],
    *,
    channel_names: Sequence[str] | None = None,
    labels_file: str | os.PathLike[str] | None = None,
    num_processes: int = 8,
) -> Source:
    """Opens the source of a label budget.

    ``source`` is an id, a name or a folder of a raw data set, or a folder with

    - ``images/`` and ``labels/`` with the same case names; images with or without channel (``case_0000.nii.gz``);
    - ``split.json`` (optional): ``{"train": [cases], "test": [cases]}``; without it all cases can be drawn;
    - ``images_unlabeled/`` (optional): further images, which never had a label;
    - ``labels.json`` (optional, or ``labels_file``): the ``labels`` entry of ``dataset.json``. Without it, classes are
      named ``label_1``, ... after the values found in all labels of the source: which structures are to be segmented
      is the same at every budget.

    ``channel_names`` must be given for a folder, except for PNG, BMP and TIFF images (``R``, ``G``, ``B`` or
    ``gray``): nnU-Net normalizes by them (``CT`` or anything else).
    """
    text = os.fspath(source)
    is_name = not isinstance(source, os.PathLike) and (text.isdigit() or re.fullmatch(r"Dataset\d{3}_[^/\\]+", text))
    if is_name or (Path(text) / "dataset.json").is_file():
        if channel_names or labels_file:
            raise UserError("channel names and labels of a raw data set are those of its dataset.json", where=source)
        return _from_raw(RawDataset.open(source))
    folder = Path(os.path.abspath(text))
    if not (folder / "images").is_dir() or not (folder / "labels").is_dir():
        raise UserError(
            "not a source of labeled cases",
            where=folder,
            expected="a raw data set (id, name or folder), or a folder with images/ and labels/",
        )
    return _from_folder(folder, channel_names, labels_file, num_processes)


def _from_raw(raw: RawDataset) -> Source:
    description = {key: value for key, value in raw.dataset_json.items() if key not in ("dataset", "provenance")}
    description.pop("numTraining")
    missing = [case for case, files in raw.labeled.items() if not Path(files.label).is_file()]
    if missing:
        raise UserError("labeled cases of the source lack their label", where=raw.folder, found=name_some(missing))
    folders: list[Iterable[str]] = [raw.labeled, raw.unlabeled, raw.test]
    _refuse_repeated_names(raw.folder, folders)
    labels = {case: files.label for case, files in raw.labeled.items()}
    for case in raw.test:
        label = raw.folder / "labelsTs" / (case + raw.file_ending)
        if label.is_file():
            labels[case] = str(label)
    images = {case: files.images for case, files in raw.labeled.items()} | raw.unlabeled | raw.test
    if images:
        _refuse_missing_channels(images)
    return Source(
        location=raw.folder,
        dataset_json=description,
        images=images,
        labels=labels,
        pool=list(raw.labeled),
        test=list(raw.test),
        unlabeled=list(raw.unlabeled),
        reader_class=raw.reader_writer_class(),
    )


def _from_folder(
    folder: Path,
    channel_names: Sequence[str] | None,
    labels_file: str | os.PathLike[str] | None,
    num_processes: int,
) -> Source:
    ending = _common_ending(folder)
    labels = {path.name[: -len(ending)]: str(path) for path in _files(folder / "labels", ending)}
    images, unlabeled = _list_images(folder, ending, labels)
    _refuse_repeated_names(folder, [images, unlabeled])
    _refuse_missing_channels({**images, **unlabeled})
    pool, test, remarks = _read_split(folder, images)
    reader = _reader_class(ending, next(iter(images.values()))[0])
    channels = _channel_names(channel_names, reader, ending, next(iter(images.values())))
    values = map_cases(
        _label_values,
        {case: (labels[case], reader) for case in [*pool, *test]},
        num_processes=num_processes,
        description="Reading labels",
    )
    found = sorted(set().union(*values.values()))
    if labels_file is None and (folder / "labels.json").is_file():
        labels_file = folder / "labels.json"
    declared, label_map = _declare_labels(found, labels_file, folder)
    if label_map:
        remarks.append(f"Labels hold {found[0]} and {found[1]}; they are written anew with 0 and 1.")
    description = {
        "channel_names": {str(index): name for index, name in enumerate(channels)},
        "labels": declared,
        "file_ending": ending,
    }
    left_out = sorted(set(images) - {*pool, *test})
    images = {case: images[case] for case in [*pool, *test]} | unlabeled
    labels = {case: labels[case] for case in [*pool, *test]}
    return Source(
        folder, description, images, labels, pool, test, list(unlabeled), reader, label_map, remarks, left_out
    )


def _common_ending(folder: Path) -> str:
    """The one ending of all images and labels."""
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

    # the longest first: .nii.gz is tried before .gz could ever be
    known = sorted({e for reader in LIST_OF_IO_CLASSES for e in reader.supported_file_endings}, key=len, reverse=True)
    endings: dict[str, str] = {}
    for name in ("images", "labels", "images_unlabeled"):
        for path in _files(folder / name, ""):
            ending = next((e for e in known if path.name.lower().endswith(e)), None)
            if ending is not None:
                endings.setdefault(path.name[-len(ending) :], f"{name}/{path.name}")
            elif path.suffix != ".json":
                raise UserError("file of an unknown format", where=path, expected="one of " + " ".join(known))
    if len(endings) != 1:
        raise UserError(
            "images and labels must all have the same file ending",
            where=folder,
            found=", ".join(endings.values()) or "no images",
        )
    return next(iter(endings))


def _files(folder: Path, ending: str) -> list[Path]:
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in paths if path.name.endswith(ending) and path.is_file() and not path.name.startswith(".")]


def _list_images(
    folder: Path, ending: str, labels: dict[str, str]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Images of ``images/`` (all with a label) and of ``images_unlabeled/``.

    Names carry a channel if labels fit the names without it: ``scan_0001`` may be a case as well as a channel.
    """
    stems = [path.name[: -len(ending)] for path in _files(folder / "images", ending)]
    with_channel = all(re.fullmatch(r".+_\d{4}", stem) and stem[:-5] in labels for stem in stems)

    def collect(name: str) -> dict[str, list[str]]:
        cases: dict[str, list[str]] = {}
        for path in _files(folder / name, ending):
            stem = path.name[: -len(ending)]
            cases.setdefault(stem[:-5] if with_channel else stem, []).append(str(path))
        return cases

    images = collect("images")
    if not images:
        raise UserError("no images", where=folder / "images", expected=f"files with ending {ending}")
    without = sorted(set(images) - set(labels))
    if without:
        raise UserError(
            "images without label",
            where=folder / "images",
            found=name_some(without),
            expected=f"labels/<case>{ending} for every image",
            fix="correct the names, or move images that have no label to images_unlabeled/",
        )
    return images, collect("images_unlabeled")


def _read_split(folder: Path, images: dict[str, list[str]]) -> tuple[list[str], list[str], list[str]]:
    """Pool and test cases, and remarks."""
    path = folder / "split.json"
    if not path.is_file():
        return sorted(images), [], []
    split = read_json(path)
    train, test = (split.get("train"), split.get("test", [])) if isinstance(split, dict) else (None, None)
    if not isinstance(train, list) or not isinstance(test, list):
        raise UserError("split file lacks its lists", where=path, expected='{"train": [cases], "test": [cases]}')
    unknown = sorted({str(case) for case in [*train, *test]} - set(images))
    named = Counter(map(str, [*train, *test]))
    twice = sorted(case for case, times in named.items() if times > 1)
    if unknown or twice:
        problem = "cases without image" if unknown else "cases twice"
        raise UserError(f"split file names {problem}", where=path, found=name_some(unknown or twice))
    left_out = len(images) - len(train) - len(test)
    remarks = [f"{left_out} case(s) are neither train nor test in {path} and left out."] if left_out else []
    return sorted(train), sorted(test), remarks


def _refuse_repeated_names(where: Path, parts: list[Iterable[str]]) -> None:
    seen: set[str] = set()
    for part in parts:
        repeated = sorted(seen & set(part))
        if repeated:
            raise UserError("the same case name in two folders of the source", where=where, found=name_some(repeated))
        seen |= set(part)


def _refuse_missing_channels(images: dict[str, list[str]]) -> None:
    """Channels are numbered anew by their order, so every case must have the same number of them."""
    usual = len(next(iter(images.values())))
    for case, files in images.items():
        if len(files) != usual:
            raise UserError(
                "cases with different numbers of channels",
                where=case,
                expected=f"{usual} file(s)",
                found=", ".join(Path(file).name for file in files),
            )


def _reader_class(ending: str, example: str) -> type:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending

    try:
        # nnU-Net prints the traceback of every reader that it tries in vain
        with contextlib.redirect_stderr(io.StringIO()):
            return determine_reader_writer_from_file_ending(ending, example, verbose=False)
    except RuntimeError:
        raise UserError("no reader of nnU-Net opens the image", where=example) from None


def _channel_names(
    channel_names: Sequence[str] | None, reader: type, ending: str, example_images: list[str]
) -> Sequence[str]:
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO

    number = sum(_read(file, reader).shape[0] for file in example_images)
    if channel_names is None:
        natural = {1: ["gray"], 3: ["R", "G", "B"], 4: ["R", "G", "B", "A"]}
        if reader is NaturalImage2DIO and number in natural:
            return natural[number]
        raise UserError(
            "the channels have no names",
            where=example_images[0],
            expected=f"{number} name(s); CT makes nnU-Net normalize as for CT, any other name per image",
            fix="--channel-names MRI",
        )
    if len(channel_names) != number:
        raise UserError(
            "number of channel names does not match the images",
            where=", ".join(example_images),
            expected=f"{number} name(s)",
            found=", ".join(channel_names),
        )
    return channel_names


def _read(file: str, reader: type, is_label: bool = False) -> np.ndarray:
    try:
        return read_volume(file, reader, is_label=is_label).array
    except UnusableFile as problem:
        raise UserError(str(problem), where=file) from None


def _label_values(file: str, reader: type) -> set[int]:
    values = np.unique(_read(file, reader, is_label=True))
    if not np.array_equal(values, np.round(values)) or values.min() < 0:
        raise UserError("label values are not non-negative integers", where=file, found=values[:10].tolist())
    return {int(value) for value in values}


def _declare_labels(
    found: list[int], labels_file: str | os.PathLike[str] | None, folder: Path
) -> tuple[dict[str, Any], dict[int, int] | None]:
    """The ``labels`` entry of dataset.json, and the translation of masks stored with another value than 1."""
    label_map = {0: 0, found[1]: 1} if len(found) == 2 and found[0] == 0 and found[1] != 1 else None
    if labels_file is None:
        values = [0, 1] if label_map else found
        if values != list(range(max(len(values), 2))):
            raise UserError(
                "label values are not consecutive from 0",
                where=folder / "labels",
                found=", ".join(map(str, found)),
                fix="renumber the labels in the files",
            )
        return {"background": 0, **{f"label_{value}": value for value in values[1:]}}, label_map
    declared = read_json(labels_file)
    validate_labels(declared, None, Path(labels_file))
    values = declared_values(declared)
    if label_map and found[1] not in values and values == [0, 1]:
        return declared, label_map
    undeclared = sorted(set(found) - set(values))
    if undeclared:
        raise UserError(
            "labels hold values that the labels file does not declare",
            where=labels_file,
            expected=", ".join(map(str, values)),
            found=", ".join(map(str, undeclared)),
        )
    return declared, None
