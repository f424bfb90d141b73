"""Comparison of methods on the cases that they were all evaluated on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from nnssl._version import __version__
from nnssl.dataset.groups import name_some
from nnssl.errors import UserError
from nnssl.evaluation.results import check_writable
from nnssl.evaluation.runs import EvaluatedRun, distance_unit, higher_is_better, perfect_value
from nnssl.evaluation.statistics import PairedStatistics, holm, paired_statistics, smallest_p
from nnssl.evaluation.wording import conclusion, limits, metric_table
from nnssl.utils.files import atomic_path, write_json

FOREGROUND = "foreground mean"
_CONVENTIONS = {
    "difference": "first method minus second, per case, mean over the runs (seeds) of a method before",
    "foreground mean": "mean over the classes of a case",
    "class absent": "a class that reference and all compared predictions of a case lack is left out; if only some "
    "predictions invent it, the others count as perfect there (Dice 1, distance 0)",
    "interval": "95 %, bootstrap over the cases, bias corrected and accelerated, 10,000 samples",
    "p": "Wilcoxon signed-rank test, two-sided, cases without difference left out",
    "p_holm": "corrected for the number of pairs of methods (per class: of pairs and classes) by Holm's method",
    "effect": "matched-pairs rank-biserial correlation, from -1 to 1, positive if the first method is better",
    "failures": "a class that reference or prediction lacks and the other has; sum over the runs",
}


@dataclass(frozen=True)
class Method:
    """Runs of one name: repetitions of one method with other seeds."""

    name: str
    runs: tuple[EvaluatedRun, ...]

    def values(self, metric: str, cases: Sequence[str], classes: Sequence[str]) -> NDArray[np.float64]:
        """(runs, cases, classes); NaN where a class is excluded."""
        return np.stack([run.table(metric).loc[list(cases), list(classes)].to_numpy() for run in self.runs])

    def failures(self, cases: Sequence[str], class_name: str | None = None) -> int:
        """Number of failures in the cases, of one class or of all."""
        return sum(
            int(
                (
                    (run.scores["status"] == "failure")
                    & run.scores["case"].isin(cases)
                    & (True if class_name is None else run.scores["class"] == class_name)
                ).sum()
            )
            for run in self.runs
        )


@dataclass(frozen=True)
class Row:
    """One pair of methods in one metric and class (or the foreground mean).

    ``least_p_holm`` is the smallest value that ``p_holm`` can take with these numbers of cases,
    ``least_p_holm_differing`` that with the cases that differ only: the test leaves out the others.
    """

    metric: str
    class_name: str
    first: str
    second: str
    first_mean: float
    second_mean: float
    statistics: PairedStatistics
    p_holm: float
    least_p_holm: float
    least_p_holm_differing: float
    comparisons: int
    first_failures: int
    second_failures: int
    runs: tuple[int, int]

    @property
    def effect(self) -> float:
        """Effect size, positive if the first method is better."""
        return self.statistics.effect * (1 if higher_is_better(self.metric) else -1)

    @property
    def win_tie_loss(self) -> tuple[int, int, int]:
        found = self.statistics
        counts = (found.positive, found.ties, found.negative)
        return counts if higher_is_better(self.metric) else counts[::-1]

    def as_dict(self) -> dict[str, Any]:
        """Flat, for tables."""
        statistics = asdict(self.statistics)
        low, high = statistics.pop("interval") or (None, None)
        wins, ties, losses = self.win_tie_loss
        return {
            "metric": self.metric,
            "class": self.class_name,
            "first": self.first,
            "second": self.second,
            "cases": statistics["n"],
            "first_runs": self.runs[0],
            "second_runs": self.runs[1],
            "first_mean": self.first_mean,
            "second_mean": self.second_mean,
            "difference": statistics["mean"],
            "interval_low": low,
            "interval_high": high,
            "p": statistics["p_value"],
            "p_holm": self.p_holm,
            "effect": self.effect,
            "wins": wins,
            "ties": ties,
            "losses": losses,
            "first_failures": self.first_failures,
            "second_failures": self.second_failures,
        }


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare_runs`: rows, notes on what was left out, and the conclusions in words.

    ``unit`` is that of distances: mm, or pixels or voxels for images without spacing.
    """

    rows: list[Row]
    cases: list[str]
    notes: list[str]
    unit: str = "mm"

    @property
    def conclusions(self) -> list[str]:
        """A sentence per pair and metric, for the foreground mean, and what limits all of them."""
        overall = [row for row in self.rows if row.class_name == FOREGROUND]
        return [conclusion(row) for row in overall] + limits(overall)

    def text(self) -> str:
        """Tables, conclusions and notes for a terminal."""
        parts = []
        for metric in dict.fromkeys(row.metric for row in self.rows):
            own = [row for row in self.rows if row.metric == metric]
            parts.append(metric_table(own, self.unit))
        lines = [f"- {line}" for line in self.conclusions] + [f"- {note}" for note in self.notes]
        return "\n\n".join([*parts, "\n".join(lines)])

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes ``.json`` (rows, conclusions, notes, conventions) or ``.csv`` (rows)."""
        target = check_comparison_output(path)
        rows = [row.as_dict() for row in self.rows]
        if target.suffix == ".csv":
            with atomic_path(target) as temporary:
                pd.DataFrame(rows).to_csv(temporary, index=False)
            return
        content = {"rows": rows, "conclusions": self.conclusions, "notes": self.notes, "cases": self.cases}
        content |= {"distance_unit": self.unit, "conventions": _CONVENTIONS, "nnssl_version": __version__}
        write_json(content, target)


def check_comparison_output(path: str | os.PathLike[str]) -> Path:
    """``path`` as a Path; ``UserError`` unless it ends with ``.json`` or ``.csv`` and its folder can be written to."""
    target = Path(path)
    if target.suffix not in (".json", ".csv"):
        raise UserError("output file must end with .json or .csv", found=target)
    check_writable(target)
    return target


def group_methods(runs: Iterable[EvaluatedRun]) -> list[Method]:
    """Methods in the order in which their names first occur."""
    by_name: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    return [Method(name, tuple(own)) for name, own in by_name.items()]


def compare_runs(
    runs: Sequence[EvaluatedRun],
    metrics: Sequence[str] = ("Dice",),
    *,
    per_class: bool = False,
    all_pairs: bool = False,
) -> Comparison:
    """Compares every further method with the first, or all pairs.

    A class of a case that is excluded (in neither reference nor prediction) in every run of a pair is left out of the
    pair; where others invent it, runs that do not count as perfect there, so that an invention costs its method.

    Raises:
        UserError: for less than two methods, unknown metrics, no case in common, or runs that were evaluated on other
            classes or reference labels.
    """
    methods = group_methods(runs)
    if len(methods) < 2:
        raise UserError("a comparison needs runs of two methods", found=", ".join(m.name for m in methods) or "none")
    cases, notes = common_cases(runs)
    classes = _common_classes(runs)
    _check_references(runs, cases)
    _check_metrics(runs, metrics)
    # the first method is the baseline: differences are those of the others from it
    pairs = list(itertools.combinations(methods, 2)) if all_pairs else [(methods[0], m) for m in methods[1:]]
    rows: list[Row] = []
    for metric in metrics:
        for family in ([None], classes) if per_class else ([None],):
            rows += _family([(m, b, name) for name in family for b, m in pairs], metric, cases, classes)
    return Comparison(rows, cases, notes, distance_unit(runs))


def common_cases(runs: Sequence[EvaluatedRun]) -> tuple[list[str], list[str]]:
    """Cases that all runs were evaluated on, and notes about the others; ``UserError`` if there are none."""
    shared = [case for case in runs[0].cases if all(case in set(run.cases) for run in runs)]
    if not shared:
        raise UserError(
            "the runs have no case in common",
            where=", ".join(str(run.summary_file) for run in runs),
            fix="predict and evaluate the same cases with every method",
        )
    notes = []
    for run in runs:
        if missing := [case for case in run.cases if case not in set(shared)]:
            notes.append(f"not compared, as not all runs have them: {name_some(missing)} ({run.name}, {run.folder})")
    return shared, notes


def paired_values(
    first: Method, second: Method, metric: str, cases: Sequence[str], classes: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Values (cases, classes) of two methods, means over their runs; NaN in both where a class is left out."""
    both = [method.values(metric, cases, classes) for method in (first, second)]
    absent = np.isnan(np.concatenate(both)).all(0)
    means = [np.where(np.isnan(values), perfect_value(metric), values).mean(0) for values in both]
    for mean in means:
        mean[absent] = np.nan
    return means[0], means[1]


def case_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the classes of each case (cases,); NaN for a case without any."""
    present = ~np.isnan(values)
    counts = present.sum(1)
    return np.where(counts > 0, np.where(present, values, 0).sum(1) / np.maximum(counts, 1), np.nan)


def _common_classes(runs: Sequence[EvaluatedRun]) -> list[str]:
    classes = [name for name in runs[0].classes if runs[0].class_values[name] != (0,)]
    for run in runs[1:]:
        if run.class_values != runs[0].class_values:
            raise UserError(
                "the runs were evaluated on different classes",
                where=run.summary_file,
                expected=f"{runs[0].class_values}, as in {runs[0].summary_file}",
                found=run.class_values,
                fix="evaluate both with the same dataset.json",
            )
    return classes


def _check_references(runs: Sequence[EvaluatedRun], cases: Sequence[str]) -> None:
    """Voxel counts of the references tell whether they are the same."""
    tables = [run.scores.pivot(index="case", columns="class", values="n_ref").loc[list(cases)] for run in runs]
    for run, table in zip(runs[1:], tables[1:], strict=True):
        differing = (table != tables[0][table.columns]).any(axis=1)
        if differing.any():
            raise UserError(
                "the runs were evaluated against different reference labels",
                where=f"case {differing.idxmax()}, {run.summary_file}",
                expected=f"the references of {runs[0].summary_file}",
                fix="evaluate both against the same references",
            )


def _check_metrics(runs: Sequence[EvaluatedRun], metrics: Sequence[str]) -> None:
    for run in runs:
        if missing := [metric for metric in metrics if metric not in run.metrics]:
            raise UserError(
                "metric not found in a run",
                where=run.summary_file,
                expected=", ".join(missing),
                found=", ".join(run.metrics),
                fix="choose one of these with --metric, or evaluate again with nnssl_evaluate",
            )


def _family(
    members: Sequence[tuple[Method, Method, str | None]], metric: str, cases: Sequence[str], classes: Sequence[str]
) -> list[Row]:
    """Rows whose p-values are corrected together. Members in which a class is in no case are left out."""
    found = []
    for first, second, class_name in members:
        a, b = paired_values(first, second, metric, cases, classes if class_name is None else [class_name])
        values = np.stack([case_means(a), case_means(b)])
        values = values[:, ~np.isnan(values[0])]
        if values.size:
            found.append((first, second, class_name, values, paired_statistics(values[0] - values[1])))
    statistics_of = [statistics for *_, statistics in found]
    corrected = holm([statistics.p_value for statistics in statistics_of])
    # Holm's values grow with every p-value of the family, so these are the smallest there can be
    least = holm([smallest_p(statistics.n) for statistics in statistics_of])
    least_differing = holm([smallest_p(statistics.n - statistics.ties) for statistics in statistics_of])
    return [
        Row(
            metric=metric,
            class_name=class_name or FOREGROUND,
            first=first.name,
            second=second.name,
            first_mean=float(values[0].mean()),
            second_mean=float(values[1].mean()),
            statistics=statistics,
            p_holm=corrected[number],
            least_p_holm=least[number],
            least_p_holm_differing=least_differing[number],
            comparisons=len(found),
            first_failures=first.failures(cases, class_name),
            second_failures=second.failures(cases, class_name),
            runs=(len(first.runs), len(second.runs)),
        )
        for number, (first, second, class_name, values, statistics) in enumerate(found)
    ]
