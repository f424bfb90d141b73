"""``nnssl_export``: a trained model for stock nnU-Net."""

from __future__ import annotations

import argparse
from pathlib import Path

from nnssl.cli._models import selected_model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnssl_export",
        description="Write a trained model so that stock nnU-Net predicts with it, without nnssl. With --shim: print "
        "the folder that makes nnssl's trainers known to stock nnU-Net where nnssl is installed "
        "(export nnUNet_extTrainer=$(nnssl_export --shim)).",
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("-d", metavar="DATASET", help="data set (id or name) of the trained model")
    which.add_argument("-m", metavar="FOLDER", type=Path, help="model folder, instead of -d, -tr, -p and -c")
    which.add_argument("--shim", action="store_true", help="print the folder for nnUNet_extTrainer")
    add("-tr", metavar="TRAINER", help="trainer. Default: the one that was trained")
    add("-p", metavar="PLANS", help="plans. Default: nnSSLPlans if trained, else the only ones")
    add("-c", metavar="CONFIGURATION", help="configuration. Default: 3d_fullres if trained, else 2d, else the only one")
    add("-f", nargs="+", metavar="FOLD", help="folds. Default: all finished ones")
    add("-chk", default="checkpoint_final.pth", help="checkpoint to export. Default: checkpoint_final.pth")
    add("-o", metavar="FOLDER", type=Path, help="folder to make, or with --zip the file")
    add("--zip", action="store_true", help="write a zip file for nnUNetv2_install_pretrained_model_from_zip")
    add("--trust_checkpoint", action="store_true", help="let the checkpoint run code while it is read. Only for files "
        "that you trust as you would trust a program")  # fmt: skip
    return parser


def main(argv: list[str]) -> int | None:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.shim:
        from nnssl.ext_trainer import shim_folder

        print(shim_folder())
        return 0
    if args.o is None:
        parser.error("-o is required")
    model = selected_model(parser, args)

    from nnssl.inference.export import export_model

    written = export_model(model, args.o, as_zip=args.zip, trust_checkpoint=args.trust_checkpoint)
    folds = " ".join(model.folds)
    if args.zip:
        print(f"Install it with: nnUNetv2_install_pretrained_model_from_zip {written}")
    else:
        print(f"Predict with it: nnUNetv2_predict_from_modelfolder -i INPUT -o OUTPUT -m {written} -f {folds}")
    return 0
