"""``nnssl_report``: one HTML file with the results, plots and pictures of runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnssl_report",
        description="Write one HTML file that needs no network: tables with intervals, tests, plots, training curves, "
        "cases with pictures, plans, provenance and commands of evaluated runs.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder with a summary.json of nnssl_evaluate, or fold folder with a "
        "validation; NAME=FOLDER gives it a name. Runs of one name are seeds of one method, or its label budgets. The "
        "first is the baseline")  # fmt: skip
    add("-o", metavar="FILE", type=Path, default=Path("report.html"), help="default: report.html")
    add("--title", default="Segmentation report", help="heading of the page")
    add("--ceiling", metavar="NAME", help="method trained with all labels: show how much of the gap between it and the "
        "baseline each method closes")  # fmt: skip
    add("--cases", type=int, default=6, metavar="N", help="show the N worst cases in pictures. Default: 6")
    add("--images", metavar="FOLDER", type=Path, help="scans of the cases. Default: those that were predicted")
    return parser


def main(argv: list[str]) -> int | None:
    args = _parser().parse_intermixed_args(argv)

    from nnssl.report.build import write_report
    from nnssl.report.results import ReportOptions

    options = ReportOptions(title=args.title, ceiling=args.ceiling, cases=args.cases, images=args.images)
    target = write_report(args.o, args.runs, options)
    print(f"Written: {target} ({target.stat().st_size / 2**20:.1f} MiB)")
    return 0
