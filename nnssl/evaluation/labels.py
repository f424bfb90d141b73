"""Which label values are evaluated, under which names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnssl.dataset.raw import declared_values, validate_labels
from nnssl.errors import UserError
from nnssl.evaluation.metrics import HIGHEST_LABEL
from nnssl.utils.files import read_json


@dataclass(frozen=True)
class EvaluationLabels:
    """The classes of an evaluation.

    ``classes``: name of each class (or region) and the label values it consists of. ``keys``: nnU-Net's name of it in
    ``summary.json``, ``"1"`` for a label and ``"(1, 2)"`` for a region. ``ignore_label``: voxels where the reference
    has it are left out. ``declared``: values that may occur in the files; None if that is not known.
    """

    classes: Mapping[str, tuple[int, ...]]
    keys: Mapping[str, str]
    ignore_label: int | None = None
    declared: frozenset[int] | None = None

    @classmethod
    def from_dataset_json(cls, dataset_json: Mapping[str, Any], where: object = "dataset.json") -> EvaluationLabels:
        """Classes as nnU-Net evaluates them: the foreground labels, or the regions if any label has several values.

        ``UserError`` (naming ``where``) if ``labels`` is missing or invalid.
        """
        labels = dataset_json.get("labels")
        validate_labels(labels, dataset_json.get("regions_class_order"), Path(str(where)))
        assert isinstance(labels, dict)
        as_lists = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
        foreground = {n: tuple(v) for n, v in as_lists.items() if n != "ignore" and set(v) != {0}}
        has_regions = any(len(values) > 1 for values in foreground.values())
        keys = {n: str(foreground[n]) if has_regions and isinstance(labels[n], list) else str(foreground[n][0])
                for n in foreground}  # fmt: skip
        if len(set(keys.values())) < len(keys):
            raise UserError(
                "two classes have the same label values", where=where, found=labels, fix="keep one name per class"
            )
        return cls(foreground, keys, labels.get("ignore"), frozenset(declared_values(labels)))

    @classmethod
    def from_values(cls, values: Iterable[int | Sequence[int]], ignore_label: int | None = None) -> EvaluationLabels:
        """Classes named by their values, as in ``nnUNetv2_evaluate_simple -l 1 2``; a sequence of values is a region.

        Other values may occur in the files and are not evaluated. ``UserError`` for no, negative or repeated values.
        """
        classes: dict[str, tuple[int, ...]] = {}
        for value in values:
            own = (int(value),) if not isinstance(value, Sequence) else tuple(int(v) for v in value)
            key = str(own) if isinstance(value, Sequence) else str(own[0])
            if key in classes or not own or min(own) < 0 or ignore_label in own:
                raise UserError(
                    "label is repeated, negative or the ignore label", where=f"label {key}", fix="check -l and -il"
                )
            _check_highest(own)
            classes[key] = own
        if not classes:
            raise UserError("no label to evaluate", fix="name the label values (-l 1 2)")
        if ignore_label is not None:
            _check_highest((ignore_label,))
        return cls(classes, {name: name for name in classes}, ignore_label)

    def is_foreground(self, name: str) -> bool:
        """False for background (value 0), which nnU-Net leaves out of the foreground mean."""
        return self.classes[name] != (0,)


def _check_highest(values: Sequence[int]) -> None:
    if too_high := [value for value in values if value > HIGHEST_LABEL]:
        raise UserError(
            "label value is too high",
            expected=f"values from 0 to {HIGHEST_LABEL}, as label files hold them",
            found=", ".join(map(str, too_high)),
            fix="check -l and -il",
        )


def find_dataset_json(reference_folder: str | os.PathLike[str], prediction_folder: str | os.PathLike[str]) -> Path:
    """The ``dataset.json`` that describes the labels of two folders.

    nnU-Net's prediction copies it beside the predictions; otherwise it lies beside the reference labels or in the data
    set folder above them. ``UserError`` if there is none.
    """
    folders = [Path(prediction_folder), Path(reference_folder), Path(reference_folder).resolve().parent]
    for folder in folders:
        if (folder / "dataset.json").is_file():
            return folder / "dataset.json"
    raise UserError(
        "no dataset.json found",
        where=", ".join(map(str, folders)),
        expected="a description of the labels",
        fix="name the file (-djfile FILE) or the label values (-l 1 2)",
    )


def read_dataset_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Content of a ``dataset.json``; ``UserError`` if it is missing, broken or not an object."""
    content = read_json(path, fix="check -djfile")
    if not isinstance(content, dict):
        raise UserError("dataset.json is not an object", where=path, found=type(content).__name__)
    return content
