"""Rows of the tables of a report, as texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nnssl.evaluation.comparison import FOREGROUND, Comparison
from nnssl.evaluation.runs import perfect_value
from nnssl.evaluation.statistics import bootstrap_interval
from nnssl.evaluation.wording import conclusion, limits
from nnssl.report.results import Results, finite, share_of_gap

_NO_BREAK = "\N{NO-BREAK SPACE}"


def method_rows(results: Results, ceiling: str | None) -> list[dict[str, Any]]:
    """Means with intervals, failures and share of the gap of every method."""
    return [
        {
            "number": number,
            "runs": len(method.runs),
            "labeled": next((t.labeled_cases for t in results.trainings[method.name] if t.labeled_cases), None),
            "means": [_mean_cell(results.means(metric)[method.name], metric) for metric in results.metrics],
            "failures": method.failures(results.cases),
            "gap": _share_cell(share_of_gap(results, method.name, ceiling)),
        }
        for number, method in enumerate(results.methods)
    ]


def difference_rows(results: Results) -> list[dict[str, Any]]:
    """Rows of the comparison with the first method, foreground means only, by method."""
    if results.comparison is None:
        return []
    numbers = {method.name: number for number, method in enumerate(results.methods)}
    rows = sorted(
        (row for row in results.comparison.rows if row.class_name == FOREGROUND), key=lambda row: numbers[row.first]
    )
    return [
        {
            "number": numbers[row.first],
            "metric": row.metric,
            "cells": [
                _with_interval(row.statistics.mean, row.statistics.interval, row.metric, signed=True),
                "/".join(map(str, row.win_tie_loss)),
                f"{row.effect:+.2f}",
                _p(row.statistics.p_value),
                _p(row.p_holm),
            ],
        }
        for row in rows
    ]


def conclusions(comparison: Comparison | None) -> tuple[list[list[str]], list[str]]:
    """Sentences by metric, and those that hold for all."""
    if comparison is None:
        return [], []
    overall = [row for row in comparison.rows if row.class_name == FOREGROUND]
    metrics = dict.fromkeys(row.metric for row in overall)
    return [[conclusion(row) for row in overall if row.metric == metric] for metric in metrics], limits(overall)


def class_rows(results: Results) -> list[dict[str, Any]]:
    """Means with intervals and failures of every class and method."""
    return [
        {
            "class": class_name,
            "name": method.name,
            "number": number,
            "means": [_mean_cell(results.values[metric][method.name][:, index], metric) for metric in results.metrics],
            "failures": method.failures(results.cases, class_name),
        }
        for index, class_name in enumerate(results.classes)
        for number, method in enumerate(results.methods)
    ]


def case_rows(results: Results, order: Sequence[str]) -> list[dict[str, Any]]:
    """Values of every case by method: what to sort by, and the text; and its failures."""
    position = {case: index for index, case in enumerate(results.cases)}
    failures = {case: sum(method.failures([case]) for method in results.methods) for case in results.cases}
    metric = results.metrics[0]
    means = results.means(metric)
    rows = []
    for case in order:
        values = [float(means[method.name][position[case]]) for method in results.methods]
        cells = [(_sortable(value), number_text(value, metric)) for value in values]
        rows.append({"case": case, "cells": cells, "failures": failures[case]})
    return rows


def _mean_cell(values: NDArray[np.float64], metric: str) -> str:
    known = finite(values)
    return _with_interval(float(known.mean()), bootstrap_interval(known), metric) if known.size else "-"


def _with_interval(value: float, interval: tuple[float, float] | None, metric: str, signed: bool = False) -> str:
    text = number_text(value, metric, signed)
    return text if interval is None else f"{text} {_bracket(number_text(end, metric, signed) for end in interval)}"


def _bracket(ends: Iterable[str]) -> str:
    """An interval, which a narrow cell shows below its value, but does not break."""
    return f"[{f',{_NO_BREAK}'.join(ends)}]"


def number_text(value: float, metric: str, signed: bool = False) -> str:
    """A value with the digits of its metric, ``-`` for none."""
    if not np.isfinite(value):
        return "-"
    digits = 4 if perfect_value(metric) == 1 else 2
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def _sortable(value: float) -> str:
    return f"{value:.6g}" if np.isfinite(value) else ""


def _share_cell(share: tuple[float, tuple[float, float] | None] | None) -> str | None:
    if share is None:
        return None
    return f"{share[0]:.2f}" + ("" if share[1] is None else f" {_bracket(f'{end:.2f}' for end in share[1])}")


def _p(value: float) -> str:
    return f"<{_NO_BREAK}0.0001" if value < 0.0001 else f"{value:.4f}"
