"""The report: one HTML file of evaluated runs, with all that it shows inside."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from nnssl._version import __version__
from nnssl.errors import UserError
from nnssl.evaluation.comparison import (
    FOREGROUND,
    Comparison,
    Method,
    case_means,
    common_cases,
    compare_runs,
    conclusion,
    group_methods,
    heading,
    limits,
    paired_values,
)
from nnssl.evaluation.runs import EvaluatedRun, higher_is_better, open_runs, perfect_value
from nnssl.evaluation.statistics import bootstrap_interval, ratio_interval
from nnssl.report import figures
from nnssl.report.pictures import View, case_views
from nnssl.report.training import Training, training_of
from nnssl.utils.files import atomic_path

_TEMPLATES = Path(__file__).parent / "templates"
_METRICS = ("Dice", "HD95", "ASSD")
_PLOTTED = ("Dice", "HD95")


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
class _Results:
    """The runs and what is computed from them once: values by metric and method, (cases, classes)."""

    methods: list[Method]
    trainings: dict[str, list[Training]]
    cases: list[str]
    classes: list[str]
    metrics: list[str]
    values: dict[str, dict[str, NDArray[np.float64]]]
    comparison: Comparison | None
    notes: list[str]

    def means(self, metric: str) -> dict[str, NDArray[np.float64]]:
        """Foreground mean of every case by method."""
        return {name: case_means(values) for name, values in self.values[metric].items()}


def write_report(
    path: str | os.PathLike[str], runs: Sequence[str | os.PathLike[str]], options: ReportOptions | None = None
) -> Path:
    """Writes the report of ``runs`` (``FOLDER`` or ``NAME=FOLDER``, see :func:`nnssl.evaluation.runs.open_runs`).

    The first method is the baseline. Names of cases, classes, methods and files are text in it, whatever they hold.

    Raises:
        UserError: as `open_runs` and `compare_runs`; for an unknown ceiling, or another ending than ``.html``.
    """
    options = options or ReportOptions()
    target = Path(path)
    if target.suffix != ".html":
        raise UserError("the report must end with .html", found=target)
    if options.cases < 0:
        raise UserError("--cases must be 0 or more", found=options.cases)
    html = render(_results(open_runs(runs), options), options)
    with atomic_path(target) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return target


def render(results: _Results, options: ReportOptions) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    script, styles = ((_TEMPLATES / name).read_text(encoding="utf-8").strip() for name in ("report.js", "report.css"))
    order = _worst_first(results)
    shown = order[: options.cases]
    sentences, limiting = _conclusions(results.comparison)
    pictures, missing = _pictures(results, shown, options)
    context = {
        "title": options.title,
        "script": Markup(script),
        "styles": Markup(styles),
        # browsers run this script and no other, and load nothing
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "made": f"nnssl {__version__}, {datetime.date.today().isoformat()}",
        "results": results,
        "names": [method.name for method in results.methods],
        "swatches": [figures.swatch(number) for number in range(len(results.methods))],
        "colors": [figures.CONTOURS[number % len(figures.CONTOURS)] for number in range(len(results.classes))],
        "method_rows": _method_rows(results, options.ceiling),
        "difference_rows": _difference_rows(results),
        "conclusions": sentences,
        "limits": limiting,
        "class_rows": _class_rows(results),
        "headings": {metric: heading(metric) for metric in results.metrics},
        "distributions": _distributions(results),
        "case_plots": [
            figures.case_plot(heading(metric), results.means(metric), metric)
            for metric in results.metrics
            if metric in _PLOTTED
        ],
        "gap": _gap_figure(results, options.ceiling),
        "ceiling": options.ceiling,
        "budgets": _budget_figure(results),
        "curves": _curve_figures(results),
        "case_rows": _case_rows(results, order),
        "pictures": pictures,
        "anchors": {entry["case"]: number for number, entry in enumerate(pictures)},
        "missing_pictures": missing,
        "runs": _run_rows(results),
        "plans": _distinct(results, lambda training: training.plans),
        "datasets": _distinct(results, lambda training: training.dataset),
    }
    return environment.get_template("report.html.j2").render(context)


def _results(runs: Sequence[EvaluatedRun], options: ReportOptions) -> _Results:
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
    comparison = compare_runs(runs, metrics, per_class=True) if len(methods) > 1 else None
    classes = [name for name in runs[0].classes if runs[0].class_values[name] != (0,)]
    values = {metric: {m.name: paired_values(m, m, metric, cases, classes)[0] for m in methods} for metric in metrics}
    by_method = {method.name: [trainings[run.summary_file] for run in method.runs] for method in methods}
    return _Results(methods, by_method, cases, classes, metrics, values, comparison, notes)


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


def _worst_first(results: _Results) -> list[str]:
    """Cases by the mean over the methods of the first metric; those without any value last."""
    metric = results.metrics[0]
    means = np.mean(list(results.means(metric).values()), axis=0)
    order = np.argsort(means if higher_is_better(metric) else -means, kind="stable")
    return [results.cases[index] for index in order]


def _method_rows(results: _Results, ceiling: str | None) -> list[dict[str, Any]]:
    return [
        {
            "number": number,
            "runs": len(method.runs),
            "labeled": next((t.labeled_cases for t in results.trainings[method.name] if t.labeled_cases), None),
            "means": [_mean_cell(results.means(metric)[method.name], metric) for metric in results.metrics],
            "failures": method.failures(results.cases),
            "gap": _share_cell(_share(results, method.name, ceiling)),
        }
        for number, method in enumerate(results.methods)
    ]


def _difference_rows(results: _Results) -> list[dict[str, Any]]:
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


def _conclusions(comparison: Comparison | None) -> tuple[list[list[str]], list[str]]:
    """Sentences by metric, and those that hold for all."""
    if comparison is None:
        return [], []
    overall = [row for row in comparison.rows if row.class_name == FOREGROUND]
    metrics = dict.fromkeys(row.metric for row in overall)
    return [[conclusion(row) for row in overall if row.metric == metric] for metric in metrics], limits(overall)


def _class_rows(results: _Results) -> list[dict[str, Any]]:
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


def _share(results: _Results, name: str, ceiling: str | None) -> tuple[float, tuple[float, float] | None] | None:
    """Share of the gap between the first method and the ceiling that a method closes; None if there is no gap."""
    methods = {method.name: method for method in results.methods}
    baseline = results.methods[0].name
    if ceiling is None or name in (baseline, ceiling) or ceiling == baseline:
        return None
    metric = results.metrics[0]
    first, own, best = (results.means(metric)[key] for key in (baseline, methods[name].name, ceiling))
    valid = ~np.isnan(first + own + best)
    gain, gap = (own - first)[valid], (best - first)[valid]
    if not valid.any() or gap.mean() * (1 if higher_is_better(metric) else -1) <= 0:
        return None
    sign = np.sign(gap.mean())
    return float(gain.mean() / gap.mean()), ratio_interval(sign * gain, sign * gap)


def _gap_figure(results: _Results, ceiling: str | None) -> Markup | None:
    shares = {method.name: _share(results, method.name, ceiling) for method in results.methods}
    known = {name: share for name, share in shares.items() if share is not None}
    return figures.gap_closed(known, str(ceiling)) if known else None


def _distributions(results: _Results) -> list[Markup]:
    found = []
    for metric in (name for name in results.metrics if name in _PLOTTED):
        found.append(figures.distribution(f"{FOREGROUND}: {heading(metric)}", results.means(metric), metric))
        if len(results.classes) > 1:
            for index, class_name in enumerate(results.classes):
                values = {name: array[:, index] for name, array in results.values[metric].items()}
                found.append(figures.distribution(f"{class_name}: {heading(metric)}", values, metric))
    return found


def _budget_figure(results: _Results) -> Markup | None:
    """Curves over label budgets, if any method was trained with several."""
    metric = results.metrics[0]
    curves: dict[str, list[tuple[int, float, tuple[float, float] | None]]] = {}
    for method in results.methods:
        labeled = {training.labeled_cases for training in results.trainings[method.name]} - {None}
        if len(labeled) == 1:
            budget = labeled.pop()
            assert budget is not None
            values = _finite(results.means(metric)[method.name])
            name = method.name.removesuffix(f", {budget} labeled")
            curves.setdefault(name, []).append((budget, float(values.mean()), bootstrap_interval(values)))
    several = {name: sorted(points) for name, points in curves.items() if len(points) > 1}
    return figures.budget_curves(several, metric) if several else None


def _curve_figures(results: _Results) -> list[Markup]:
    losses: dict[str, list[tuple[int, Any, Any]]] = {}
    for number, method in enumerate(results.methods):
        for training in results.trainings[method.name]:
            for name in training.losses:
                assert training.curves is not None
                known = training.curves[["epoch", name]].dropna()
                if len(known):
                    losses.setdefault(name, []).append((number, known["epoch"].to_list(), known[name].to_list()))
    return [figures.curve(name, lines) for name, lines in losses.items()]


def _case_rows(results: _Results, order: Sequence[str]) -> list[dict[str, Any]]:
    position = {case: index for index, case in enumerate(results.cases)}
    failures = {case: sum(method.failures([case]) for method in results.methods) for case in results.cases}
    metric = results.metrics[0]
    means = results.means(metric)
    rows = []
    for case in order:
        values = [float(means[method.name][position[case]]) for method in results.methods]
        cells = [(_sortable(value), _number(value, metric)) for value in values]
        rows.append({"case": case, "cells": cells, "failures": failures[case]})
    return rows


def _pictures(
    results: _Results, cases: Sequence[str], options: ReportOptions
) -> tuple[list[dict[str, Any]], list[str]]:
    """Views of the cases with a contour per method, and sentences about cases that cannot be shown."""
    shown, missing = [], []
    position = {case: index for index, case in enumerate(results.cases)}
    metric = results.metrics[0]
    for case in cases:
        # of several seeds the first
        runs = [method.runs[0] for method in results.methods]
        files = [runs[0].files[case].reference, *(run.files[case].prediction for run in runs)]
        image = _find_image(results, case, options.images)
        lost = [str(file) for file in files if file is None or not file.is_file()]
        if image is None or lost:
            reason = f"files not found: {', '.join(lost)}" if lost else "its scan was not found (--images FOLDER)"
            missing.append(f"{case}: {reason}")
            continue
        classes = {name: runs[0].class_values[name] for name in results.classes}
        try:
            views: list[View] = case_views(image, [file for file in files if file is not None], classes)
        except UserError as error:
            missing.append(f"{case}: {error.message} ({error.where})")
            continue
        scores = [
            ", ".join(
                f"{name} {_number(results.values[metric][method.name][position[case], index], metric)}"
                for index, name in enumerate(results.classes)
            )
            for method in results.methods
        ]
        shown.append({"case": case, "views": views, "scores": scores, "metric": metric})
    return shown, missing


def _find_image(results: _Results, case: str, folder: Path | None) -> Path | None:
    """First channel of the scan of a case."""
    prediction = results.methods[0].runs[0].files[case].prediction
    ending = "" if prediction is None else prediction.name.removeprefix(case)
    trainings = [training for own in results.trainings.values() for training in own]
    places = [folder] if folder is not None else [path for t in trainings for path in t.image_folders]
    raw = os.environ.get("nnUNet_raw")
    if folder is None and raw:
        names = {str(training.record["dataset"]) for training in trainings if "dataset" in training.record}
        places += [Path(raw, name, part) for name in sorted(names) for part in ("imagesTr", "imagesTs")]
    wanted = (f"{case}_0000{ending}", f"{case}{ending}")
    for place in places:
        candidates = [place] if place.is_file() else [place / name for name in wanted]
        for candidate in candidates:
            if candidate.name in wanted and candidate.is_file():
                return candidate
    return None


def _run_rows(results: _Results) -> list[dict[str, Any]]:
    rows = []
    for method in results.methods:
        for run, training in zip(method.runs, results.trainings[method.name], strict=True):
            record = training.record
            rows.append(
                {
                    "name": method.name,
                    "summary_file": str(run.summary_file),
                    "fold_folder": str(training.fold_folder or "not found"),
                    "command": shlex.join(map(str, record["command"])) if record.get("command") else "not recorded",
                    "seed": record.get("settings", {}).get("seed"),
                    "hyperparameters": _json(record.get("hyperparameters", {})),
                    "environment": {
                        **record.get("versions", {}), **record.get("machine", {}),
                        **{key: record[key] for key in ("device", "processes") if key in record},
                    },
                    "prediction": _json(training.prediction),
                    "notes": list(run.summary.get("notes", [])),
                }
            )  # fmt: skip
    return rows


def _distinct(results: _Results, part: Any) -> list[tuple[str, str]]:
    """Different contents of a file with the methods that have it."""
    users: dict[str, list[str]] = {}
    for method in results.methods:
        for training in results.trainings[method.name]:
            if part(training):
                own = users.setdefault(_json(part(training)), [])
                own += [method.name] if method.name not in own else []
    return [(", ".join(names), text) for text, names in users.items()]


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False)


def _finite(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return values[np.isfinite(values)]


def _mean_cell(values: NDArray[np.float64], metric: str) -> str:
    finite = _finite(values)
    return _with_interval(float(finite.mean()), bootstrap_interval(finite), metric) if finite.size else "-"


def _with_interval(value: float, interval: tuple[float, float] | None, metric: str, signed: bool = False) -> str:
    text = _number(value, metric, signed)
    return text if interval is None else f"{text} [{', '.join(_number(end, metric, signed) for end in interval)}]"


def _number(value: float, metric: str, signed: bool = False) -> str:
    if not np.isfinite(value):
        return "-"
    digits = 4 if perfect_value(metric) == 1 else 2
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def _sortable(value: float) -> str:
    return f"{value:.6g}" if np.isfinite(value) else ""


def _share_cell(share: tuple[float, tuple[float, float] | None] | None) -> str | None:
    if share is None:
        return None
    interval = "" if share[1] is None else f" [{share[1][0]:.2f}, {share[1][1]:.2f}]"
    return f"{share[0]:.2f}{interval}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"
