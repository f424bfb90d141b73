"""Files with the estimates of the quality of predicted masks (see `nnssl.inference.uncertainty`)."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from nnssl.utils.files import atomic_path, read_json

FOLDER = "uncertainty"
QUALITY_FILE = "quality.csv"
KINDS = ("entropy", "disagreement")
"""Maps of a case."""
_COLUMNS = ("case", "members", "estimated_dice", "mean_entropy", "agreement")


def estimates_file(output: Path, name: str) -> Path:
    """File with the estimates of a case."""
    return output / FOLDER / f"{name}.json"


def map_file(output: Path, name: str, kind: str) -> Path:
    """File with a map of a case, ``kind`` of `KINDS`."""
    return output / FOLDER / f"{name}_{kind}.nii.gz"


def discard_estimates(output: Path, names: Iterable[str]) -> list[Path]:
    """Removes the maps and estimates of cases, also from ``quality.csv``; returns the files that are gone."""
    files = [
        file for name in names for file in (estimates_file(output, name), *(map_file(output, name, k) for k in KINDS))
    ]
    gone = [file for file in files if file.is_file()]
    for file in gone:
        file.unlink(missing_ok=True)
    table = output / FOLDER / QUALITY_FILE
    if gone and table.is_file():
        if has_estimates(output):
            collect_quality(output)
        else:
            table.unlink(missing_ok=True)
            gone.append(table)
    with suppress(OSError):  # not empty, or not there
        table.parent.rmdir()
    return gone


def has_estimates(output: Path) -> bool:
    """Whether there is a case to collect."""
    return any((output / FOLDER).glob("*.json"))


def collect_quality(output: Path) -> Path:
    """Writes ``uncertainty/quality.csv`` from the estimates of all cases in the folder, likely failures first."""
    import pandas as pd

    rows = [read_json(file) for file in sorted((output / FOLDER).glob("*.json"))]
    table = pd.DataFrame(rows, columns=list(_COLUMNS))
    with atomic_path(output / FOLDER / QUALITY_FILE) as temporary:
        table.sort_values("estimated_dice", na_position="first").to_csv(temporary, index=False)
    return output / FOLDER / QUALITY_FILE
