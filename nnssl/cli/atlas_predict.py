"""``nnssl_atlas_predict``: segment scans by registration of labeled cases, without any training."""

from __future__ import annotations

import argparse
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnssl_atlas_predict",
        description="Segment scans without training: the labeled cases (atlases) of a raw data set are registered to "
        "each scan, their labels are propagated and fused. The classical comparator of few-shot methods.",
    )
    add = parser.add_argument
    add("-i", nargs="+", required=True, metavar="INPUT", type=Path, help="folder of scans, or scans. Names as in "
        "nnU-Net (CASE_0000.nii.gz)")  # fmt: skip
    add("-o", required=True, metavar="FOLDER", type=Path, help="folder for the masks")
    add("-d", required=True, metavar="DATASET", help="data set (id or name) below $nnUNet_raw with the labeled cases")
    add("--atlases", nargs="+", default=[], metavar="CASE", help="labeled cases to register. Default: all of them")
    add("--transform", choices=["deformable", "affine"], default="deformable", help="default: deformable")
    add("--fusion", choices=["local", "majority"], default="local", help="local weighs the atlases in each voxel by "
        "how alike they are there. Default: local")  # fmt: skip
    add("--allow_suspicious", action="store_true", help="take NaN and infinite values in NIfTI files for 0, as nnU-Net "
        "does; else such files are refused")  # fmt: skip
    add("--continue_prediction", action="store_true", help="leave out cases that are already done")
    add("-np", type=int, metavar="N", help="number of processes. Default: 8 (or the environment variable "
        "nnUNet_def_n_proc), at most the number of cores")  # fmt: skip
    return parser


def main(argv: list[str]) -> int | None:
    args = _parser().parse_args(argv)

    from nnssl.dataset.parallel import default_processes
    from nnssl.dataset.raw import RawDataset
    from nnssl.inference.atlases import AtlasOptions, predict_by_atlases

    options = AtlasOptions(
        fusion=args.fusion,
        transform=args.transform,
        atlases=tuple(args.atlases),
        continue_prediction=args.continue_prediction,
        allow_suspicious=args.allow_suspicious,
        num_processes=default_processes() if args.np is None else args.np,
    )
    print(predict_by_atlases(args.i, args.o, RawDataset.open(args.d), options))
    return 0
