"""``nnssl_compare``: do the results of two or more runs differ?"""

from __future__ import annotations

import argparse
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnssl_compare",
        description="Compare evaluated runs on the cases they have in common: paired differences with 95 % intervals, "
        "Wilcoxon signed-rank test (Holm), effect size, wins, failures, and in words what may be concluded.",
    )
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="folder with a summary.json of nnssl_evaluate, or fold folder with a "
        "validation; NAME=FOLDER gives it a name. Runs of one name are seeds of one method. The first is the baseline "
        "of the others")  # fmt: skip
    add("--metric", nargs="+", default=["Dice"], metavar="NAME", help="Dice, IoU, HD95, ASSD, NSD@1mm, volume_error. "
        "Default: Dice")  # fmt: skip
    add("--per-class", action="store_true", help="compare every class, too")
    add("--all-pairs", action="store_true", help="compare every pair of methods, not only with the first")
    add("-o", metavar="FILE", type=Path, help="write the comparison, too (.json or .csv)")
    return parser


def main(argv: list[str]) -> int | None:
    # folders and their flags may stand in any order
    args = _parser().parse_intermixed_args(argv)

    from nnssl.evaluation.comparison import check_comparison_output, compare_runs
    from nnssl.evaluation.runs import open_runs

    output = None if args.o is None else check_comparison_output(args.o)
    result = compare_runs(open_runs(args.runs), args.metric, per_class=args.per_class, all_pairs=args.all_pairs)
    if output is not None:
        result.write(output)
    print(result.text())
    if output is not None:
        print(f"\nWritten: {output}")
    return 0
