"""nnU-Net's three folders and the data set names in them."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nnssl.errors import UserError

_WHAT = {
    "nnUNet_raw": "raw data sets (DatasetXXX_Name with imagesTr, labelsTr, imagesUn)",
    "nnUNet_preprocessed": "plans and preprocessed data",
    "nnUNet_results": "trained models",
}


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        raise UserError(
            f"the environment variable {variable} is not set",
            expected=f"the folder of {_WHAT[variable]}",
            fix=f"export {variable}=/path/to/folder",
        )
    return Path(value)


def raw_folder() -> Path:
    """Folder ``$nnUNet_raw``; ``UserError`` if the variable is not set."""
    return _folder("nnUNet_raw")


def preprocessed_folder() -> Path:
    """Folder ``$nnUNet_preprocessed``; ``UserError`` if the variable is not set."""
    return _folder("nnUNet_preprocessed")


def results_folder() -> Path:
    """Folder ``$nnUNet_results``; ``UserError`` if the variable is not set."""
    return _folder("nnUNet_results")


def dataset_name(name_or_id: str | int) -> str:
    """Full data set name for an id (``4``, ``"4"``, ``"004"``) or a name, looked up in nnU-Net's three folders.

    A full name (``Dataset004_X``) is returned as it is. ``UserError`` if no data set, or more than one, has the id.
    """
    text = str(name_or_id)
    if re.fullmatch(r"Dataset\d{3}_.+", text):
        return text
    if not text.isdigit():
        raise UserError("not a data set", found=text, expected="an id such as 4 or a name such as Dataset004_Name")
    found: set[str] = set()
    for variable in _WHAT:
        folder = os.environ.get(variable)
        if folder and Path(folder).is_dir():
            found |= {d.name for d in Path(folder).glob(f"Dataset{int(text):03d}_*") if d.is_dir()}
    if not found:
        raise UserError(
            f"no data set with id {int(text)}",
            where=", ".join(f"${v}={os.environ.get(v, 'not set')}" for v in _WHAT),
            expected=f"a folder Dataset{int(text):03d}_Name in one of them",
            fix="check the id and the three environment variables",
        )
    if len(found) > 1:
        raise UserError(
            f"more than one data set has the id {int(text)}",
            found=", ".join(sorted(found)),
            fix="name the data set in full or give one of them another id",
        )
    return found.pop()
