"""The result of an evaluation: a table of all cases and classes, its summary, and the files and text made of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from nnssl._version import __version__
from nnssl.errors import UserError
from nnssl.evaluation.cases import CaseResult, CaseTask
from nnssl.evaluation.labels import EvaluationLabels
from nnssl.evaluation.metrics import metric_names, nsd_name
from nnssl.utils.files import atomic_path, write_json

_KEYS = ("case", "class", "label", "status")
_COUNTS = ("n", "excluded", "failures")
_UNITS = {
    "Dice": "1",
    "IoU": "1",
    "HD95": "mm",
    "ASSD": "mm",
    "NSD": "1",
    "volume_reference, volume_prediction, volume_error": "mm^3 (mm^2 for 2D images)",
    "TP, FP, FN, TN, n_ref, n_pred": "voxels",
}
_CONVENTIONS = {
    "surfaces": "Nikolov et al. 2021 (surface-distance): marching-cubes surface elements weighted by their area",
    "HD95": "larger one of the two directed 95 % percentiles",
    "ASSD": "mean over the area of both surfaces",
    "NSD": "share of the area of both surfaces within the tolerance",
    "volume_error": "prediction minus reference",
    "excluded": "class is empty in reference and prediction: metrics are NaN and not part of any mean; volumes and "
    "voxel counts are",
    "failure": "class is empty in one of them: Dice, IoU, NSD are 0, HD95 and ASSD the diagonal of the image",
    "mean": "mean over the cases; n is the number of cases that are not excluded, failures included",
    "foreground_mean": "mean over the classes of their means, without background and without classes that have n = 0",
}


@dataclass(frozen=True)
class Evaluation:
    """Result of :func:`nnssl.evaluation.evaluator.evaluate_folders`.

    Attributes:
        per_case: one row per case and class: case, class, label (nnU-Net's key), status (``scored``, ``excluded``,
            ``failure``) and the metrics (see :class:`nnssl.evaluation.metrics.ClassScore`).
        per_class: one row per class (index: its name): label, n, excluded, failures and the mean of each metric.
        summary: what ``summary.json`` holds: nnU-Net's ``foreground_mean``, ``mean``, ``metric_per_case`` with more
            metrics, and labels, counts, units, conventions and version.
        notes: sentences about what was seen and not evaluated.
    """

    per_case: pd.DataFrame
    per_class: pd.DataFrame
    summary: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    @property
    def foreground_mean(self) -> dict[str, float]:
        """Mean over the foreground classes of their means over the cases, as nnU-Net's; with the summed counts."""
        return self.summary["foreground_mean"]

    @property
    def unit(self) -> str:
        """Unit of distances: mm, or pixels or voxels if the files of no case tell the spacing."""
        return self.summary["units"]["HD95"]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes ``summary`` to ``path`` (``.json``), and ``per_case`` beside it with the ending ``.csv``.

        As in nnU-Net's file, a metric without value is NaN. ``UserError`` as :func:`check_output`.
        """
        target = check_output(path)
        write_json(self.summary, target)
        with atomic_path(target.with_suffix(".csv")) as temporary:
            self.per_case.to_csv(temporary, index=False)

    def table(self) -> str:
        """Text table: per class and foreground mean the counts, Dice, IoU, HD95 and ASSD in `unit`, and NSD."""
        nsd = [nsd_name(tolerance) for tolerance in self.summary["nsd_tolerance_mm"]]
        shown = ["Dice", "IoU", "HD95", "ASSD", *nsd]
        rows = [["class", *_COUNTS, *shown]]
        means = [(str(name), row.to_dict()) for name, row in self.per_class.iterrows()]
        for name, row in [*means, ("foreground mean", self.foreground_mean)]:
            counts = [str(int(row[count])) for count in _COUNTS]
            rows.append([name, *counts, *(_cell(row[metric], metric) for metric in shown)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
        rule = "-" * len(lines[0])
        return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def check_output(path: str | os.PathLike[str]) -> Path:
    """``path`` as a Path.

    ``UserError`` unless it ends with ``.json``, its folder can be written to, and the table beside it would replace
    none but a table of an evaluation.
    """
    target = Path(path)
    if target.suffix != ".json":
        raise UserError("output file must end with .json", found=target, fix="for example -o summary.json")
    check_writable(target)
    _check_table(target.with_suffix(".csv"))
    return target


def check_writable(target: Path) -> None:
    """``UserError`` unless a file can be made in the folder of ``target``, or in the first one above that exists."""
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    try:
        # permissions alone do not tell it: the user may be root, the disk full, the file system a special one
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(
            "output folder cannot be written to", where=folder, found=error.strerror, fix="name another file (-o FILE)"
        ) from None


def _check_table(file: Path) -> None:
    """``UserError`` if ``file`` exists and is not a table of an evaluation."""
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as stream:
        header = stream.readline()
    if header and not header.startswith(",".join(_KEYS)):
        raise UserError(
            "a file that no evaluation wrote is in the place of the table of the cases",
            where=file,
            fix="name another file (-o FILE.json, beside which FILE.csv is written), or move this one away",
        )


def collect(
    tasks: Mapping[str, CaseTask],
    results: Mapping[str, CaseResult],
    labels: EvaluationLabels,
    tolerances_mm: Sequence[float],
    notes: list[str],
) -> Evaluation:
    """Tables and summary of the scores of all cases."""
    metrics = metric_names(tolerances_mm)
    rows = [
        {"case": case, "class": name, "label": labels.keys[name], "status": score.status, **score.metrics}
        for case, result in results.items()
        for name, score in result.scores.items()
    ]
    per_case = pd.DataFrame(rows, columns=[*_KEYS, *metrics])
    per_class = _means_per_class(per_case, labels, metrics)
    foreground = per_class[[labels.is_foreground(name) for name in per_class.index]]
    foreground_mean = foreground.loc[foreground["n"] > 0, metrics].mean().to_dict()
    foreground_mean |= {count: int(foreground[count].sum()) for count in _COUNTS}
    never_scored = foreground.index[foreground["n"] == 0].tolist()
    if never_scored:
        notes = [*notes, f"in no case, and so not part of the foreground mean: {', '.join(never_scored)}"]
    summary = {
        "foreground_mean": foreground_mean,
        "mean": {row["label"]: row.drop("label").to_dict() for _, row in per_class.iterrows()},
        "metric_per_case": [_case_entry(tasks[case], result, labels) for case, result in results.items()],
        "labels": {key: name for name, key in labels.keys.items()},
        "ignore_label": labels.ignore_label,
        "nsd_tolerance_mm": list(tolerances_mm),
        "units": _units(results),
        "conventions": _CONVENTIONS,
        "notes": notes,
        "nnssl_version": __version__,
    }
    return Evaluation(per_case, per_class, summary, notes)


def _units(results: Mapping[str, CaseResult]) -> dict[str, str]:
    """Units by metric; not in mm if the files of all cases tell no spacing."""
    own = {result.unit for result in results.values()}
    if len(own) != 1 or "mm" in own:
        return _UNITS
    return {name: min(own) if unit.startswith("mm") else unit for name, unit in _UNITS.items()}


def _means_per_class(per_case: pd.DataFrame, labels: EvaluationLabels, metrics: list[str]) -> pd.DataFrame:
    rows = {}
    for name in labels.classes:
        own = per_case[per_case["class"] == name]
        excluded = int((own["status"] == "excluded").sum())
        counts = {
            "n": len(own) - excluded,
            "excluded": excluded,
            "failures": int((own["status"] == "failure").sum()),
        }
        rows[name] = {"label": labels.keys[name], **counts, **own[metrics].mean().to_dict()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("class")


def _case_entry(task: CaseTask, result: CaseResult, labels: EvaluationLabels) -> dict[str, Any]:
    return {
        "case": task.case,
        # absolute, for those who read the summary in another working directory
        "reference_file": os.path.abspath(task.reference_file),
        "prediction_file": os.path.abspath(task.prediction_file),
        "metrics": {labels.keys[name]: score.metrics for name, score in result.scores.items()},
        "status": {labels.keys[name]: score.status for name, score in result.scores.items()},
    }


def _cell(value: float, metric: str) -> str:
    if pd.isna(value):
        return "-"
    return f"{value:.2f}" if metric in ("HD95", "ASSD") else f"{value:.4f}"
