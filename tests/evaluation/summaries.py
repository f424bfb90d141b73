"""Summaries of evaluations without files of images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

Scores = Mapping[str, Sequence[float | None]]


def write_summary(folder: Path, scores: Scores, *, hd95: bool = True, sizes: Mapping[str, int] | None = None) -> Path:
    """``summary.json`` with the Dice of classes a, b, ... by case.

    None: the class is in neither mask; 0: it is in the reference alone. HD95 is ``10 * (1 - Dice)``.
    """
    entries = []
    for case, values in scores.items():
        metrics, status = {}, {}
        for key, dice in enumerate(values, start=1):
            n_ref = 0 if dice is None or dice < 0 else (sizes or {}).get(case, 100)
            value = float("nan") if dice is None else max(dice, 0.0)
            metrics[str(key)] = {"Dice": value, "n_ref": n_ref, "n_pred": 0 if not value > 0 and n_ref else n_ref}
            if hd95:
                metrics[str(key)]["HD95"] = 10 * (1 - value)
            status[str(key)] = "excluded" if dice is None else "scored" if dice > 0 else "failure"
        entries.append({"case": case, "metrics": metrics, "status": status})
    count = len(next(iter(scores.values())))
    labels = {str(key): "abcdef"[key - 1] for key in range(1, count + 1)}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "summary.json"
    file.write_text(json.dumps({"metric_per_case": entries, "labels": labels}))
    return file
