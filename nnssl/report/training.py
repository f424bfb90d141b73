"""What a run folder tells about the training behind an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from nnssl.evaluation.runs import EvaluatedRun
from nnssl.utils.files import read_json

RECORD = "predict_from_raw_data_args.json"
_NO_LOSS = ("epoch", "iteration", "lr", "step_seconds", "data_wait")


@dataclass(frozen=True)
class Training:
    """Files of a trained fold, as far as they are there.

    Attributes:
        fold_folder: folder of the (first) fold that predicted; None if the evaluation does not lead to one.
        record: ``run.json``: command, hyper-parameters, versions, machine.
        curves: ``curves.csv``, one row per epoch.
        plans, dataset: ``plans.json`` and ``dataset.json`` of the model.
        prediction: how the masks were predicted.
        problems: sentences about files that cannot be shown.
    """

    fold_folder: Path | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    curves: pd.DataFrame | None = None
    plans: Mapping[str, Any] = field(default_factory=dict)
    dataset: Mapping[str, Any] = field(default_factory=dict)
    prediction: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def losses(self) -> list[str]:
        """Columns of ``curves`` that are losses or scores of epochs."""
        return [] if self.curves is None else [name for name in self.curves.columns if name not in _NO_LOSS]

    @property
    def labeled_cases(self) -> int | None:
        """Number of labeled cases of the training; None if that is not recorded."""
        recorded = self.record.get("cases", {}).get("labeled")
        if recorded is None and self.record.get("fold") == "all":
            recorded = self.plans.get("semi_supervised", {}).get("num_labeled") or self.dataset.get("numTraining")
        return recorded

    @property
    def image_folders(self) -> list[Path]:
        """Where the predicted scans came from: folders, or the files themselves."""
        sources = self.prediction.get("inputs", self.prediction.get("list_of_lists_or_source_folder", []))
        sources = [sources] if isinstance(sources, str) else sources
        return [Path(source) for source in sources if isinstance(source, str)]


def training_of(run: EvaluatedRun) -> Training:
    """Follows the record of the prediction, or the place of a validation, to the trained fold."""
    prediction = _read(run.folder / RECORD)
    if prediction:
        model = Path(prediction.get("model_folder") or prediction.get("model_training_output_dir") or run.folder)
        folds = prediction.get("folds") or prediction.get("use_folds") or []
        fold = model / f"fold_{folds[0]}" if folds else None
    elif run.folder.name == "validation":
        fold = run.folder.absolute().parent
        model = fold.parent
    else:
        return Training()
    curves, problems = (None, ()) if fold is None else _read_curves(fold / "curves.csv")
    return Training(
        fold_folder=fold if fold is not None and fold.is_dir() else None,
        record=_read(fold / "run.json") if fold is not None else {},
        curves=curves,
        # the copies beside the masks outlive a model folder that was moved away
        plans=_read(model / "plans.json") or _read(run.folder / "plans.json"),
        dataset=_read(model / "dataset.json") or _read(run.folder / "dataset.json"),
        prediction=prediction,
        problems=problems,
    )


def _read_curves(path: Path) -> tuple[pd.DataFrame | None, tuple[str, ...]]:
    """``curves.csv``, or None and why: it may be empty or damaged, as after a crash of the machine."""
    if not path.is_file():
        return None, ()
    try:
        curves = pd.read_csv(path)
        if "epoch" in curves.columns:
            return curves, ()
        reason = "it has no column epoch"
    except ValueError as error:  # of pandas, or of the decoding
        reason = str(error)
    return None, (f"the curves of the training are not shown ({path}: {reason})",)


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
