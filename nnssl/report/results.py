"""What the parts of a report share: its options, and the values of all methods, cases and classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nnssl.errors import UserError
from nnssl.evaluation.comparison import (
    Comparison,
    Method,
    case_means,
    common_cases,
    compare_runs,
    group_methods,
    paired_values,
)
from nnssl.evaluation.runs import EvaluatedRun, distance_unit, higher_is_better
from nnssl.evaluation.statistics import ratio_interval
from nnssl.evaluation.wording import heading
from nnssl.report.training import Training, training_of

_METRICS = ("Dice", "HD95", "ASSD")


@dataclass(frozen=True)
class ReportOptions:
    """What the report shows.

    Attributes:
        title: heading of the page.
        ceiling: method whose distance from the first one is the gap that others may close.
        cases: number of cases shown in pictures, the worst ones.
        images: folder of the scans; by default where the predictions were made from.
    """

    title: str = "Segmentation report"
    ceiling: str | None = None
    cases: int = 6
    images: Path | None = None


@dataclass(frozen=True)
class Results:
    """The runs and what is computed from them once: values by metric and method, (cases, classes)."""

    methods: list[Method]
    trainings: dict[str, list[Training]]
    cases: list[str]
    classes: list[str]
    metrics: list[str]
    values: dict[str, dict[str, NDArray[np.float64]]]
    comparison: Comparison | None
    notes: list[str]

    def heading(self, metric: str) -> str:
        """The metric with its unit and direction."""
        return heading(metric, distance_unit([run for method in self.methods for run in method.runs]))

    def means(self, metric: str) -> dict[str, NDArray[np.float64]]:
        """Foreground mean of every case by method."""
        return {name: case_means(values) for name, values in self.values[metric].items()}


def gather_results(runs: Sequence[EvaluatedRun], options: ReportOptions) -> Results:
    """Compares the runs and collects their values on the cases they have in common.

    Raises:
        UserError: as `compare_runs`, and for a ceiling that is none of the methods.
    """
    trainings = {run.summary_file: training_of(run) for run in runs}
    runs = _named_by_budget(runs, trainings)
    methods = group_methods(runs)
    if options.ceiling is not None and options.ceiling not in [method.name for method in methods]:
        raise UserError(
            "--ceiling is none of the methods",
            expected=", ".join(method.name for method in methods),
            found=options.ceiling,
        )
    metrics = [name for name in runs[0].metrics if name in _METRICS or name.startswith("NSD@")]
    metrics = [name for name in metrics if all(name in run.metrics for run in runs)]
    cases, notes = common_cases(runs)
    notes += [problem for training in trainings.values() for problem in training.problems]
    comparison = compare_runs(runs, metrics, per_class=True) if len(methods) > 1 else None
    classes = [name for name in runs[0].classes if runs[0].class_values[name] != (0,)]
    values = {metric: {m.name: paired_values(m, m, metric, cases, classes)[0] for m in methods} for metric in metrics}
    by_method = {method.name: [trainings[run.summary_file] for run in method.runs] for method in methods}
    return Results(methods, by_method, cases, classes, metrics, values, comparison, notes)


def _named_by_budget(runs: Sequence[EvaluatedRun], trainings: Mapping[Path, Training]) -> list[EvaluatedRun]:
    """Runs of one name that were trained on different numbers of labeled cases become methods of their own."""
    budgets: dict[str, set[int | None]] = {}
    for run in runs:
        budgets.setdefault(run.name, set()).add(trainings[run.summary_file].labeled_cases)
    return [
        replace(run, name=f"{run.name}, {trainings[run.summary_file].labeled_cases or 'unknown'} labeled")
        if len(budgets[run.name]) > 1
        else run
        for run in runs
    ]


def worst_first(results: Results) -> list[str]:
    """Cases by the mean over the methods that have a value in the first metric; those without any last."""
    metric = results.metrics[0]
    means = case_means(np.stack(list(results.means(metric).values()), axis=1))
    order = np.argsort(means if higher_is_better(metric) else -means, kind="stable")
    return [results.cases[index] for index in order]


def share_of_gap(results: Results, name: str, ceiling: str | None) -> tuple[float, tuple[float, float] | None] | None:
    """Share of the gap between the first method and the ceiling that a method closes; None if there is no gap.

    Both differences are paired, as in the comparison: a class that one of the two invents counts as perfect in the
    other. A case in which neither of two methods has a class that can be scored is a difference of 0 between them.
    """
    methods = {method.name: method for method in results.methods}
    baseline = results.methods[0]
    if ceiling is None or name in (baseline.name, ceiling) or ceiling == baseline.name:
        return None
    metric = results.metrics[0]
    gain, gap = (_differences(methods[other], baseline, metric, results) for other in (name, ceiling))
    known = ~(np.isnan(gain) & np.isnan(gap))
    gain, gap = np.nan_to_num(gain[known]), np.nan_to_num(gap[known])
    if not gap.size or gap.mean() * (1 if higher_is_better(metric) else -1) <= 0:
        return None
    sign = np.sign(gap.mean())
    return float(gain.mean() / gap.mean()), ratio_interval(sign * gain, sign * gap)


def _differences(first: Method, second: Method, metric: str, results: Results) -> NDArray[np.float64]:
    """Foreground means of the first method minus those of the second, (cases,); NaN where neither has a class."""
    own, other = paired_values(first, second, metric, results.cases, results.classes)
    return case_means(own) - case_means(other)


def finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values that are not NaN."""
    return values[np.isfinite(values)]
