"""Files with the estimates of the quality of predicted masks (see `nnssl.inference.uncertainty`)."""

from __future__ import annotations

from pathlib import Path

from nnssl.utils.files import atomic_path, read_json

FOLDER = "uncertainty"
QUALITY_FILE = "quality.csv"
_COLUMNS = ("case", "members", "estimated_dice", "mean_entropy", "agreement")


def estimates_file(output: Path, name: str) -> Path:
    """File with the estimates of a case."""
    return output / FOLDER / f"{name}.json"


def collect_quality(output: Path) -> Path:
    """Writes ``uncertainty/quality.csv`` from the estimates of all cases in the folder, likely failures first."""
    import pandas as pd

    rows = [read_json(file) for file in sorted((output / FOLDER).glob("*.json"))]
    table = pd.DataFrame(rows, columns=list(_COLUMNS))
    with atomic_path(output / FOLDER / QUALITY_FILE) as temporary:
        table.sort_values("estimated_dice", na_position="first").to_csv(temporary, index=False)
    return output / FOLDER / QUALITY_FILE
