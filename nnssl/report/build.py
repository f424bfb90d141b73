"""The report: one HTML file of evaluated runs, with all that it shows inside."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nnssl._version import __version__
from nnssl.errors import UserError
from nnssl.evaluation.comparison import FOREGROUND
from nnssl.evaluation.results import check_writable
from nnssl.evaluation.runs import open_runs
from nnssl.evaluation.statistics import bootstrap_interval
from nnssl.report import figures
from nnssl.report.pictures import View, case_views
from nnssl.report.results import ReportOptions, Results, finite, gather_results, share_of_gap, worst_first
from nnssl.report.tables import case_rows, class_rows, conclusions, difference_rows, method_rows, number_text
from nnssl.utils.files import atomic_path

_TEMPLATES = Path(__file__).parent / "templates"
_PLOTTED = ("Dice", "HD95")


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
    check_writable(target)
    if options.cases < 0:
        raise UserError("--cases must be 0 or more", found=options.cases)
    html = render(gather_results(open_runs(runs), options), options)
    with atomic_path(target) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return target


def render(results: Results, options: ReportOptions) -> str:
    """The page as text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    script, styles = ((_TEMPLATES / name).read_text(encoding="utf-8").strip() for name in ("report.js", "report.css"))
    order = worst_first(results)
    shown = order[: options.cases]
    sentences, limiting = conclusions(results.comparison)
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
        "method_rows": method_rows(results, options.ceiling),
        "difference_rows": difference_rows(results),
        "conclusions": sentences,
        "limits": limiting,
        "class_rows": class_rows(results),
        "headings": {metric: results.heading(metric) for metric in results.metrics},
        "distributions": _distributions(results),
        "case_plots": [
            figures.case_plot(results.heading(metric), results.means(metric), metric)
            for metric in results.metrics
            if metric in _PLOTTED
        ],
        "gap": _gap_figure(results, options.ceiling),
        "ceiling": options.ceiling,
        "budgets": _budget_figure(results),
        "curves": _curve_figures(results),
        "case_rows": case_rows(results, order),
        "pictures": pictures,
        "anchors": {entry["case"]: number for number, entry in enumerate(pictures)},
        "missing_pictures": missing,
        "runs": _run_rows(results),
        "plans": _distinct(results, lambda training: training.plans),
        "datasets": _distinct(results, lambda training: training.dataset),
    }
    return environment.get_template("report.html.j2").render(context)


def _gap_figure(results: Results, ceiling: str | None) -> Markup | None:
    shares = {method.name: share_of_gap(results, method.name, ceiling) for method in results.methods}
    known = {name: share for name, share in shares.items() if share is not None}
    return figures.gap_closed(known, str(ceiling)) if known else None


def _distributions(results: Results) -> list[Markup]:
    found = []
    for metric in (name for name in results.metrics if name in _PLOTTED):
        found.append(figures.distribution(f"{FOREGROUND}: {results.heading(metric)}", results.means(metric), metric))
        if len(results.classes) > 1:
            for index, class_name in enumerate(results.classes):
                values = {name: array[:, index] for name, array in results.values[metric].items()}
                found.append(figures.distribution(f"{class_name}: {results.heading(metric)}", values, metric))
    return found


def _budget_figure(results: Results) -> Markup | None:
    """Curves over label budgets, if any method was trained with several."""
    metric = results.metrics[0]
    curves: dict[str, list[tuple[int, float, tuple[float, float] | None]]] = {}
    for method in results.methods:
        labeled = {training.labeled_cases for training in results.trainings[method.name]} - {None}
        if len(labeled) == 1:
            budget = labeled.pop()
            assert budget is not None
            values = finite(results.means(metric)[method.name])
            name = method.name.removesuffix(f", {budget} labeled")
            curves.setdefault(name, []).append((budget, float(values.mean()), bootstrap_interval(values)))
    several = {name: sorted(points) for name, points in curves.items() if len(points) > 1}
    return figures.budget_curves(several, metric) if several else None


def _curve_figures(results: Results) -> list[Markup]:
    losses: dict[str, list[tuple[int, Any, Any]]] = {}
    for number, method in enumerate(results.methods):
        for training in results.trainings[method.name]:
            for name in training.losses:
                assert training.curves is not None
                known = training.curves[["epoch", name]].dropna()
                if len(known):
                    losses.setdefault(name, []).append((number, known["epoch"].to_list(), known[name].to_list()))
    return [figures.curve(name, lines) for name, lines in losses.items()]


def _pictures(results: Results, cases: Sequence[str], options: ReportOptions) -> tuple[list[dict[str, Any]], list[str]]:
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
                f"{name} {number_text(results.values[metric][method.name][position[case], index], metric)}"
                for index, name in enumerate(results.classes)
            )
            for method in results.methods
        ]
        shown.append({"case": case, "views": views, "scores": scores, "metric": metric})
    return shown, missing


def _find_image(results: Results, case: str, folder: Path | None) -> Path | None:
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


def _run_rows(results: Results) -> list[dict[str, Any]]:
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


def _distinct(results: Results, part: Any) -> list[tuple[str, str]]:
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
