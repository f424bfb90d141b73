"""``nnssl_evaluate``: compare predictions with reference labels."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnssl_evaluate",
        description="Compare predictions with reference labels: Dice, IoU, HD95 and ASSD in mm, NSD, volumes, per "
        "class and case. A class that is empty in both is excluded; empty in one is a failure and counts with Dice 0.",
    )
    add = parser.add_argument
    add("-gt", required=True, metavar="FOLDER", type=Path, help="folder of the reference labels")
    add("-pred", required=True, metavar="FOLDER", type=Path, help="folder of the predictions, named as the references")
    add("-o", metavar="FILE", type=Path, help="summary (.json); the rows of all cases are written beside it as .csv. "
        "Default: summary.json in the folder of the predictions")  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-djfile", metavar="FILE", type=Path, help="dataset.json that declares the labels. Default: the "
        "one beside the predictions, beside the references, or in the folder above the references")  # fmt: skip
    which.add_argument("-l", nargs="+", type=int, metavar="LABEL", help="label values to evaluate, instead of a "
        "dataset.json")  # fmt: skip
    add("-il", type=int, metavar="LABEL", help="with -l: voxels where the reference has this value are left out")
    add("--nsd_tolerance", nargs="+", type=float, default=[1.0], metavar="MM", help="tolerances of NSD in mm. "
        "Default: 1")  # fmt: skip
    add("--cases", nargs="+", metavar="CASE", help="cases to evaluate. Default: all references; a missing prediction "
        "is an error")  # fmt: skip
    add("-np", type=int, metavar="N", help="number of processes. Default: 8 (or the environment variable "
        "nnUNet_def_n_proc), at most the number of cores")  # fmt: skip
    return parser


def main(argv: list[str]) -> int | None:
    args = _parser().parse_args(argv)

    from nnssl.evaluation.evaluator import evaluate_folders
    from nnssl.evaluation.results import check_output

    output = check_output(args.o or args.pred / "summary.json")
    result = evaluate_folders(
        args.gt,
        args.pred,
        args.l,
        dataset_json=args.djfile,
        ignore_label=args.il,
        num_processes=args.np,
        nsd_tolerance_mm=args.nsd_tolerance,
        cases=args.cases,
    )
    for note in result.notes:
        print(f"warning: {note}", file=sys.stderr)
    # written first: what reads the table may be gone
    result.write(output)
    print(result.table())
    print(f"HD95 and ASSD in {result.unit}. Written: {output}, {output.with_suffix('.csv').name}")
    return 0
