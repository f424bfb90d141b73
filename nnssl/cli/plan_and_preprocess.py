"""``nnssl_plan_and_preprocess``: fingerprint, plan and preprocess labeled and unlabeled cases."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnssl.preprocessing.pipeline import Preparation

_WORKERS = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}
_OTHER_WORKERS = 4
_FINGERPRINT_WORKERS = 8


def main(argv: list[str]) -> int | None:
    args = _parser().parse_args(argv)
    configurations = list(dict.fromkeys(args.c))
    workers = _workers(configurations, args.np)

    import torch

    from nnssl.preprocessing.pipeline import prepare_dataset

    if args.pl != "nnSSLPlannerCPU" and not torch.cuda.is_available():
        print("No CUDA device found: to train on this machine, use the preset for CPUs with -pl nnSSLPlannerCPU.")
    with contextlib.redirect_stderr(_NotATerminal(sys.stderr)) if args.no_pbar else contextlib.nullcontext():
        for dataset in args.d:
            preparation = prepare_dataset(
                dataset,
                planner=args.pl,
                configurations=configurations,
                num_processes=workers,
                num_processes_fingerprint=args.npfp,
                check_integrity=not args.skip_integrity_check,
                allow_suspicious=args.allow_suspicious,
                preprocess=not args.no_pp,
                clean=args.clean,
                gpu_memory_target_in_gb=args.gpu_memory_target,
                preprocessor_name=args.preprocessor_name,
                overwrite_target_spacing=args.overwrite_target_spacing,
                overwrite_plans_name=args.overwrite_plans_name,
                mirror_axes=args.mirror_axes,
                align_atlases=args.align_atlases,
                verbose=args.verbose,
                tell=lambda sentence: print(sentence, flush=True),
            )
            print(summary(preparation))
    return None


def summary(preparation: Preparation) -> str:
    """What was planned and done, and the command to type next."""
    from nnssl.planners.correspondence import describe as describe_correspondence
    from nnssl.planners.mirroring import describe

    plans = preparation.plans
    memory = plans.get("semi_supervised", {}).get("gpu_memory_target_in_gb")
    lines = [
        "",
        f"{preparation.dataset}: {preparation.num_labeled} labeled and {preparation.num_unlabeled} unlabeled cases",
        f"Plans: {plans['plans_name']}, {plans['experiment_planner_used']}"
        + (f", {memory:g} GB for a semi-supervised step" if memory else ""),
        *_configuration_table(preparation),
        *describe(plans),
        *describe_correspondence(plans),
        *(f"Note: {note}" for note in preparation.notes),
        f"Next: {_next_command(preparation)}",
    ]
    return "\n".join(lines)


def _configuration_table(preparation: Preparation) -> list[str]:
    done = {outcome.configuration: outcome for outcome in preparation.outcomes}
    rows = [("configuration", "patch", "spacing", "batch", "cases")]
    for name, configuration in preparation.plans["configurations"].items():
        if "patch_size" not in configuration:
            continue  # the cascade, which inherits from 3d_fullres and uses its cases
        batch = configuration.get("semi_supervised", {})
        unlabeled = f" + {batch['unlabeled_batch_size']} unlabeled" if batch else ""
        outcome = done.get(name)
        rows.append(
            (
                name,
                "x".join(str(size) for size in configuration["patch_size"]),
                "x".join(f"{mm:.4g}" for mm in configuration["spacing"]),
                f"{configuration['batch_size']} labeled{unlabeled}",
                f"{outcome.made} preprocessed, {outcome.unchanged} unchanged, {outcome.removed} removed"
                if outcome
                else "not preprocessed",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _next_command(preparation: Preparation) -> str:
    plans = preparation.plans
    configuration = (
        "3d_fullres" if "3d_fullres" in preparation.planned or not preparation.planned else preparation.planned[0]
    )
    default = "3d_fullres" if "3d_fullres" in plans["configurations"] else "2d"
    words = ["nnssl_train", str(int(preparation.dataset[len("Dataset") :][:3])), "auto", "all"]
    if configuration != default:
        words += ["-c", configuration]
    if plans["plans_name"] != "nnSSLPlans":
        words += ["-p", plans["plans_name"]]
    return " ".join(words)


def _workers(configurations: list[str], given: list[int] | None) -> dict[str, int]:
    if given is None:
        cores = _cores()
        return {name: min(_WORKERS.get(name, _OTHER_WORKERS), cores) for name in configurations}
    from nnssl.errors import UserError

    if len(given) not in (1, len(configurations)):
        raise UserError(
            "-np needs one number, or one per configuration",
            expected=f"1 or {len(configurations)} numbers ({' '.join(configurations)})",
            found=" ".join(map(str, given)),
        )
    return dict(zip(configurations, given * len(configurations) if len(given) == 1 else given, strict=True))


def _cores() -> int:
    # the cores this process may use, which on clusters are fewer than the machine has
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _NotATerminal:
    """Stream on which progress bars, which draw on terminals only, stay silent."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def isatty(self) -> bool:
        return False


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _mirror_axes(text: str) -> Any:
    if text in ("auto", "all", "none"):
        return text
    axes = text.split(",")
    if not all(axis.isdecimal() for axis in axes):
        raise argparse.ArgumentTypeError(f"{text} is not auto, all, none or a list of axes such as 0,1")
    return tuple(map(int, axes))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnssl_plan_and_preprocess",
        description="Checks a data set, extracts its fingerprint, plans, and preprocesses labeled (imagesTr, labelsTr) "
        "and unlabeled cases (imagesUn). A second run does only what is new or changed.",
    )
    add = parser.add_argument
    add("-d", nargs="+", required=True, metavar="DATASET", help="ids or names of data sets, such as 4 or Dataset004_X")
    add(
        "-c",
        nargs="+",
        default=["2d", "3d_fullres", "3d_lowres"],
        metavar="CONFIGURATION",
        help="configurations to preprocess (default: 2d 3d_fullres 3d_lowres); those not planned are left out",
    )
    add(
        "-pl",
        default="nnSSLPlanner",
        metavar="PLANNER",
        help="nnSSLPlanner (default), nnSSLPlannerResEncM, nnSSLPlannerResEncL, nnSSLPlannerCPU, or one of nnU-Net's",
    )
    add(
        "-np",
        nargs="+",
        type=_positive,
        default=None,
        metavar="N",
        help="processes for preprocessing: one number, or one per configuration (default: 8 for 2d and 3d_lowres, 4 "
        "for others, not more than there are cores); use fewer if memory runs out",
    )
    add(
        "-npfp",
        type=_positive,
        default=min(_FINGERPRINT_WORKERS, _cores()),
        metavar="N",
        help="processes for integrity check and fingerprint (default: 8, not more than there are cores)",
    )
    integrity = parser.add_mutually_exclusive_group()
    integrity.add_argument(
        "--verify_dataset_integrity",
        action="store_true",
        help="check the data set first; this is done anyway, the flag is nnU-Net's",
    )
    integrity.add_argument("--skip_integrity_check", action="store_true", help="do not check the data set first")
    add(
        "--allow_suspicious",
        action="store_true",
        help="go on although the check finds empty labels, constant images, the same image twice, an unlabeled "
        "case that is a test case, or NaN: what is a mistake most of the time, and sometimes meant",
    )
    add("--no_pp", action="store_true", help="fingerprint and plans only, no preprocessing")
    add("--clean", action="store_true", help="extract the fingerprint and preprocess all cases again")
    add(
        "-gpu_memory_target",
        type=float,
        default=None,
        metavar="GB",
        help="GPU memory of a whole semi-supervised step (default: 18; ResEncL 54, CPU 1); with one of nnU-Net's "
        "planners that of a supervised step. Changes patch and batch size",
    )
    add("-preprocessor_name", default="DefaultPreprocessor", metavar="CLASS", help="preprocessor class of nnU-Net")
    add(
        "-overwrite_target_spacing",
        nargs=3,
        type=float,
        default=None,
        metavar="MM",
        help="target spacing of 3d_fullres and 3d_cascade_fullres, in the axis order of the images",
    )
    add(
        "-overwrite_plans_name",
        default=None,
        metavar="NAME",
        help="name of the plans, to be given to the other commands with -p; recommended with the four flags above",
    )
    add(
        "--mirror-axes",
        type=_mirror_axes,
        default="auto",
        metavar="AXES",
        help="axes that training and prediction mirror: auto (default; all but those along which classes that look "
        "alike keep their order in the labeled cases), all, none, or axes such as 0,1 of the 3D patch (of the 2D patch "
        "for 2D images)",
    )
    add(
        "--align-atlases",
        choices=("affine", "deformable", "none"),
        help="register the labeled cases to one of them, so that nnssl_train --atlas-augmentation finds corresponding "
        "positions where images show different sections of the body; used if it makes the labels overlap better. Kept "
        "up to date by later runs; none removes it (default: no alignment)",
    )
    add("--verbose", action="store_true", help="show what nnU-Net prints while planning and preprocessing")
    add(
        "--no_pbar", action="store_true", help="no progress bars (there are none either where output is not a terminal)"
    )
    return parser
