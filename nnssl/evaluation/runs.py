"""Evaluated runs: what ``summary.json`` of an evaluation holds, as a table that runs can be compared by."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nnssl.errors import UserError
from nnssl.utils.files import read_json

_DEPTH = 4
_SUMMARY = "summary.json"
_LOWER_IS_BETTER = ("HD95", "ASSD", "volume_error")


@dataclass(frozen=True)
class CaseFiles:
    """Files of a case, as the evaluation recorded them; None where it did not."""

    reference: Path | None
    prediction: Path | None


@dataclass(frozen=True)
class EvaluatedRun:
    """One evaluation of one trained model.

    Attributes:
        name: of the method; runs of one name are repetitions of it (seeds).
        summary_file: ``summary.json`` of ``nnssl_evaluate``, of a validation, or of nnU-Net's own evaluation.
        summary: its content.
        scores: one row per case and class: case, class, status, and the metrics.
        files: files by case.
    """

    name: str
    summary_file: Path
    summary: Mapping[str, Any]
    scores: pd.DataFrame
    files: Mapping[str, CaseFiles]

    @property
    def folder(self) -> Path:
        """The folder of the predictions."""
        return self.summary_file.parent

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(self.scores["case"]))

    @property
    def classes(self) -> list[str]:
        return list(dict.fromkeys(self.scores["class"]))

    @property
    def class_values(self) -> dict[str, tuple[int, ...]]:
        """Label values by class."""
        keys = dict(zip(self.scores["class"], self.scores["label"], strict=True))
        return {name: tuple(int(part) for part in key.strip("()").split(",") if part) for name, key in keys.items()}

    @property
    def metrics(self) -> list[str]:
        """Metrics that runs can be compared by."""
        return [
            name
            for name in self.scores.columns
            if name in ("Dice", "IoU", *_LOWER_IS_BETTER) or name.startswith("NSD@")
        ]

    def table(self, metric: str) -> pd.DataFrame:
        """Values of a metric, cases by classes; NaN where the class is in neither mask. Of errors the size."""
        values = self.scores.pivot(index="case", columns="class", values=metric)
        excluded = self.scores.pivot(index="case", columns="class", values="status") == "excluded"
        return values.abs().mask(excluded).astype(float)


def higher_is_better(metric: str) -> bool:
    return metric not in _LOWER_IS_BETTER


def distance_unit(runs: Sequence[EvaluatedRun]) -> str:
    """Unit of distances: mm, or pixels or voxels if any of the runs was evaluated on images without spacing."""
    units = [run.summary.get("units") for run in runs]
    named = [unit.get("HD95", "mm") for unit in units if isinstance(unit, dict)]
    return next((unit for unit in named if unit != "mm"), "mm")


def perfect_value(metric: str) -> float:
    return 1.0 if higher_is_better(metric) else 0.0


def open_runs(texts: Sequence[str | os.PathLike[str]]) -> list[EvaluatedRun]:
    """Opens runs written as ``FOLDER`` or ``NAME=FOLDER``.

    A folder without a name is named after the trainer if the runs differ by it, else by the part of its path in which
    they differ. Only given names make runs seeds of one method.

    Raises:
        UserError: if a folder holds no or several evaluations, if one is damaged, if a run is named twice, or if a run
            without a name would be called as one that was given a name.
    """
    pairs = [_split_name(os.fspath(text)) for text in texts]
    files = [find_summary(Path(folder)) for _, folder in pairs]
    repeated = [file for number, file in enumerate(files) if file.resolve() in {f.resolve() for f in files[:number]}]
    if repeated:
        raise UserError("a run is named twice", where=repeated[0])
    unnamed = [file for (name, _), file in zip(pairs, files, strict=True) if name is None]
    proposed = _names(unnamed)
    given = {name: folder for name, folder in pairs if name is not None}
    for name, file in zip(proposed, unnamed, strict=True):
        if name in given:
            raise UserError(
                "a run without a name would be called as another one",
                where=file,
                found=f"{name}, which is given to {given[name]}",
                fix=f"name it, too (NAME={file.parent}); runs of one given name are seeds of one method",
            )
    remaining = iter(proposed)
    return [open_run(file, name or next(remaining)) for (name, _), file in zip(pairs, files, strict=True)]


def open_run(summary_file: Path, name: str) -> EvaluatedRun:
    """Reads one ``summary.json``; ``UserError`` if it is not one of an evaluation."""
    summary = read_json(summary_file)
    entries = summary.get("metric_per_case") if isinstance(summary, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(
            "not a summary of an evaluation with values per case",
            where=summary_file,
            fix="evaluate with nnssl_evaluate",
        )
    labels = summary.get("labels", {})
    rows, files = [], {}
    try:
        for entry in entries:
            reference, prediction = (entry.get(key) for key in ("reference_file", "prediction_file"))
            case = entry.get("case") or _case_name(str(prediction))
            files[case] = CaseFiles(Path(reference) if reference else None, Path(prediction) if prediction else None)
            for key, metrics in entry["metrics"].items():
                status = entry.get("status", {}).get(key) or _status(metrics)
                rows.append({"case": case, "class": labels.get(key, key), "label": key, "status": status, **metrics})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError("summary of an evaluation is damaged", where=summary_file, found=repr(error)) from None
    scores = pd.DataFrame(rows)
    if scores.duplicated(["case", "class"]).any():
        raise UserError("summary names a case twice", where=summary_file)
    return EvaluatedRun(name, summary_file, summary, scores, files)


def find_summary(folder: Path) -> Path:
    """``summary.json`` of a run: the file itself, or that in the folder, its ``validation``, or the only one below.

    Raises:
        UserError: if there is none, or several.
    """
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise UserError("run not found", where=folder, expected="a folder with summary.json, or NAME=FOLDER")
    for candidate in (folder / _SUMMARY, folder / "validation" / _SUMMARY):
        if candidate.is_file():
            return candidate
    found = sorted(file for depth in range(1, _DEPTH + 1) for file in folder.glob("*/" * depth + _SUMMARY))
    if len(found) != 1:
        raise UserError(
            "run has no evaluation" if not found else "run has several evaluations",
            where=folder,
            expected=f"one {_SUMMARY}",
            found="\n".join(["", *(f"    {file}" for file in found[:10])]) if found else None,
            fix="name the folder of one" if found else "evaluate the predictions with nnssl_evaluate",
        )
    return found[0]


def _split_name(text: str) -> tuple[str | None, str]:
    name, sign, folder = text.partition("=")
    # a path may hold the sign, too
    if sign and name and not Path(text).exists():
        return name, folder
    return None, text


def _names(files: Sequence[Path]) -> list[str]:
    trainers = [trainer_of(file) for file in files]
    if None not in trainers and len(set(trainers)) == len(trainers):
        return [str(trainer) for trainer in trainers]
    parts = [file.absolute().parent.parts for file in files]
    for depth in range(1, min(map(len, parts), default=0)):
        names = [own[-depth] for own in parts]
        if len(set(names)) == len(names):
            return names
    folders = [str(file.parent) for file in files]
    return folders if len(set(folders)) == len(folders) else [str(file) for file in files]


def trainer_of(summary_file: Path) -> str | None:
    """Trainer of the model that was evaluated, by nnU-Net's names of folders; None if they do not tell."""
    record = summary_file.parent / "predict_from_raw_data_args.json"
    model = None
    if record.is_file():
        content = read_json(record)
        model = content.get("model_folder") or content.get("model_training_output_dir")
    elif summary_file.parent.name == "validation":
        model = summary_file.absolute().parents[2]
    name = Path(model).name if model else ""
    return name.split("__")[0] if name.count("__") == 2 else None


def _case_name(file: str) -> str:
    name = Path(file).name
    return name[:-7] if name.endswith(".nii.gz") else Path(name).stem


def _status(metrics: Mapping[str, Any]) -> str:
    """Status of a class in the summary of nnU-Net, which does not tell it."""
    if metrics["Dice"] is None or math.isnan(metrics["Dice"]):
        return "excluded"
    in_one = (metrics["n_ref"] == 0) != (metrics["n_pred"] == 0)
    return "failure" if in_one else "scored"
