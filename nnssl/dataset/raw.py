"""The raw data set: which case is labeled, which is not, and where its files are.

Layout (nnU-Net's, plus ``imagesUn``)::

    nnUNet_raw/DatasetXXX_Name/
        dataset.json
        imagesTr/<case>_0000.nii.gz    labeled cases, one file per channel
        labelsTr/<case>.nii.gz
        imagesUn/<case>_0000.nii.gz    unlabeled cases: same channels, same file ending
        imagesTs/<case>_0000.nii.gz    test cases (optional)
        groups.json                    {case: patient} (optional, see ``nnssl.dataset.groups``)
        splits_final.json              folds (optional, see ``nnssl.dataset.splits``)
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nnssl.errors import UserError
from nnssl.utils.files import read_json
from nnssl.utils.paths import dataset_name, raw_folder

_FORMAT = "https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md"


class LabeledCase(NamedTuple):
    """Files of a labeled case: one image file per channel, and the label file."""

    images: list[str]
    label: str


@dataclass(frozen=True)
class RawDataset:
    """A raw data set as it lies on disk; ``open`` it by id, name or folder.

    Cases are sorted by name. Files are absolute paths. That the files can be read and agree with each other is the
    business of :func:`nnssl.dataset.integrity.check_dataset`; here only ``dataset.json`` is validated.
    """

    name: str
    folder: Path
    dataset_json: dict[str, Any]
    labeled: dict[str, LabeledCase]
    unlabeled: dict[str, list[str]]
    test: dict[str, list[str]]

    @classmethod
    def open(cls, name_or_id_or_folder: str | int | os.PathLike[str]) -> RawDataset:
        """Opens a data set by id (``4``), name (``"Dataset004_X"``, below ``$nnUNet_raw``) or folder.

        ``UserError`` if there is no such folder or if its ``dataset.json`` is missing or invalid. ``imagesUn`` and
        ``imagesTs`` may be missing or empty.
        """
        folder = _locate(name_or_id_or_folder)
        description = read_json(folder / "dataset.json", fix=f"write it as described in {_FORMAT}")
        validate_dataset_json(description, folder / "dataset.json")
        ending = description["file_ending"]
        if "dataset" in description:
            labeled = _explicit_cases(folder, description)
        else:
            labeled = {
                case: LabeledCase(images, str(folder / "labelsTr" / (case + ending)))
                for case, images in list_cases(folder / "imagesTr", ending).items()
            }
        return cls(
            name=folder.name,
            folder=folder,
            dataset_json=description,
            labeled=labeled,
            unlabeled=list_cases(folder / "imagesUn", ending),
            test=list_cases(folder / "imagesTs", ending),
        )

    @property
    def file_ending(self) -> str:
        return self.dataset_json["file_ending"]

    @property
    def num_channels(self) -> int:
        return len(self.dataset_json["channel_names"])

    @property
    def has_explicit_files(self) -> bool:
        """True if ``dataset.json`` names the files of the labeled cases itself, so that ``imagesTr`` plays no part."""
        return "dataset" in self.dataset_json

    @property
    def ignore_label(self) -> int | None:
        return self.dataset_json["labels"].get("ignore")

    @property
    def label_values(self) -> list[int]:
        """Every value a label file may hold: background, classes and the ignore label."""
        return declared_values(self.dataset_json["labels"])

    def reader_writer_class(self) -> type:
        """nnU-Net's reader for this data set, found as nnU-Net finds it: by the ending and by trying example files.

        Some of the first files may be broken (the integrity check tells), so several are tried, quietly.
        """
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        files = [case.images[0] for case in self.labeled.values() if case.images]
        files += [images[0] for images in self.unlabeled.values()]
        for example in [*files[:5], None]:
            with contextlib.suppress(RuntimeError), contextlib.redirect_stderr(io.StringIO()):
                return determine_reader_writer_from_dataset_json(self.dataset_json, example, verbose=False)
        raise UserError("no reader of nnU-Net opens the images", where=self.folder, found=self.file_ending)


def list_cases(folder: Path, file_ending: str) -> dict[str, list[str]]:
    """``{case: image files, one per channel}`` of a folder, both sorted; empty if the folder is missing.

    The rule is nnU-Net's (``<case>_XXXX<ending>``, XXXX the channel). Other names are left to the integrity check.
    nnU-Net's own listing starts twelve processes for it, and makes cases without images of misnamed files.
    """
    name_rule = re.compile(rf"(.+)_\d{{4}}{re.escape(file_ending)}", re.DOTALL)
    cases: dict[str, list[str]] = {}
    if folder.is_dir():
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            match = name_rule.fullmatch(entry.name)
            if match and entry.is_file():
                cases.setdefault(match.group(1), []).append(os.path.abspath(entry.path))
    return dict(sorted(cases.items()))


def declared_values(labels: dict[str, int | list[int]]) -> list[int]:
    """All label values of the ``labels`` entry of ``dataset.json`` (classes, regions and ignore label), sorted."""
    values: set[int] = set()
    for value in labels.values():
        values.update(value if isinstance(value, list) else [value])
    return sorted(values)


def validate_dataset_json(description: Any, path: Path) -> None:
    """``UserError`` unless ``description`` is a ``dataset.json`` that nnU-Net and nnssl can work with."""
    if not isinstance(description, dict):
        raise UserError("dataset.json is not an object", where=path, fix=f"write it as described in {_FORMAT}")
    required = ("channel_names", "labels", "numTraining", "file_ending")
    missing = [key for key in required if key not in description]
    if missing:
        fix = f"add {', '.join(missing)} as described in {_FORMAT}"
        if "modality" in description:
            fix = "this is the format of nnU-Net version 1: convert it with nnUNetv2_convert_old_nnUNet_dataset"
        raise UserError(f"dataset.json lacks {', '.join(missing)}", where=path, fix=fix)
    _validate_channels(description["channel_names"], path)
    validate_labels(description["labels"], description.get("regions_class_order"), path)
    number = description["numTraining"]
    if not _is_integer(number) or number < 0:
        raise UserError("numTraining is not a number of cases", where=path, found=repr(number))
    _validate_ending(description, path)
    if "dataset" in description:
        _validate_explicit(description["dataset"], path)


def _locate(name_or_id_or_folder: str | int | os.PathLike[str]) -> Path:
    text = os.fspath(name_or_id_or_folder) if not isinstance(name_or_id_or_folder, int) else str(name_or_id_or_folder)
    is_path = isinstance(name_or_id_or_folder, os.PathLike)
    if not is_path and (text.isdigit() or re.fullmatch(r"Dataset\d{3}_[^/\\]+", text)):
        folder = raw_folder() / dataset_name(text)
        fix = "check $nnUNet_raw and the name of the data set"
    else:
        folder = Path(text)
        fix = "give an id (4), a name (Dataset004_Name) or the folder of a raw data set"
    if not folder.is_dir():
        raise UserError("no raw data set there", where=folder, fix=fix)
    return Path(os.path.abspath(folder))


def _explicit_cases(folder: Path, description: dict[str, Any]) -> dict[str, LabeledCase]:
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    # nnU-Net writes the resolved paths into the dictionary it is given
    files = get_filenames_of_train_images_and_targets(str(folder), copy.deepcopy(description))
    return {case: LabeledCase(list(files[case]["images"]), files[case]["label"]) for case in sorted(files)}


def _validate_channels(channels: Any, path: Path) -> None:
    names = list(channels.values()) if isinstance(channels, dict) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(
            "channel_names of dataset.json is not an object with a name per channel",
            where=path,
            expected='such as {"0": "T1", "1": "FLAIR"}',
            found=channels,
        )
    expected = [str(index) for index in range(len(names))]
    if list(channels) != expected:
        raise UserError(
            "the keys of channel_names are not the channel numbers in order",
            where=path,
            expected=", ".join(expected),
            found=", ".join(channels),
        )


def validate_labels(labels: Any, region_order: Any, path: Path) -> None:
    """``UserError`` unless ``labels`` is a valid ``labels`` entry of ``dataset.json`` (read from ``path``)."""
    example = 'such as {"background": 0, "liver": 1, "tumor": 2}'
    if not isinstance(labels, dict) or not labels:
        raise UserError("labels of dataset.json is not an object", where=path, expected=example, found=labels)
    for name, value in labels.items():
        values = value if isinstance(value, list) and value else [value]
        if not all(_is_integer(v) and v >= 0 for v in values):
            fix = None
            if name.isdigit() and isinstance(value, str):
                fix = f'turn name and value round: "{value}": {name}'
            raise UserError(
                f"label {name!r} has no integer value", where=path, expected=example, found=repr(value), fix=fix
            )
    if labels.get("background") != 0:
        raise UserError(
            "labels of dataset.json must contain background with value 0",
            where=path,
            found=labels.get("background", "no background"),
        )
    values = declared_values(labels)
    if values != list(range(len(values))):
        raise UserError(
            "label values of dataset.json are not consecutive",
            where=path,
            expected=", ".join(map(str, range(len(values)))),
            found=", ".join(map(str, values)),
            fix="renumber the labels, in the label files as well",
        )
    _validate_ignore_and_regions(labels, region_order, path)


def _validate_ignore_and_regions(labels: dict[str, Any], region_order: Any, path: Path) -> None:
    classes = {name: value for name, value in labels.items() if name != "ignore"}
    highest = declared_values(classes)[-1]
    if highest == 0:
        raise UserError("labels of dataset.json declare no foreground class", where=path, found=labels)
    if "ignore" in labels and labels["ignore"] != highest + 1:
        raise UserError(
            "the ignore label must be the highest value", where=path, expected=highest + 1, found=labels["ignore"]
        )
    if any(isinstance(value, list) and len(set(value)) > 1 for value in classes.values()):
        regions = [name for name, value in classes.items() if value != 0 and value != [0]]
        order_is_valid = isinstance(region_order, list) and len(region_order) == len(regions)
        if not order_is_valid or not all(_is_integer(value) for value in region_order):
            raise UserError(
                "regions need regions_class_order in dataset.json, one label value per region",
                where=path,
                expected=f"{len(regions)} values, for {', '.join(regions)}",
                found=region_order,
            )


def _validate_ending(description: dict[str, Any], path: Path) -> None:
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

    ending = description["file_ending"]
    known = sorted({known for reader in LIST_OF_IO_CLASSES for known in reader.supported_file_endings})
    reader_is_named = description.get("overwrite_image_reader_writer", "None") != "None"
    if not isinstance(ending, str) or not ending.startswith(".") or not (ending.lower() in known or reader_is_named):
        raise UserError(
            "file_ending of dataset.json is not a format of nnU-Net",
            where=path,
            expected="one of " + " ".join(known),
            found=repr(ending),
            fix="convert the images, or name a reader as overwrite_image_reader_writer",
        )


def _validate_explicit(cases: Any, path: Path) -> None:
    if not isinstance(cases, dict):
        raise UserError('"dataset" in dataset.json is not an object', where=path, found=type(cases).__name__)
    for case, files in cases.items():
        images = files.get("images") if isinstance(files, dict) else None
        label = files.get("label") if isinstance(files, dict) else None
        images_are_valid = isinstance(images, list) and images and all(isinstance(image, str) for image in images)
        if not images_are_valid or not isinstance(label, str):
            raise UserError(
                f'case {case!r} of "dataset" in dataset.json lacks images or label',
                where=path,
                expected='{"images": ["one file per channel"], "label": "file"}',
                found=files,
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
