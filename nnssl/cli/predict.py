"""``nnssl_predict``: segment scans with a trained model."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnssl.cli._models import selected_model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnssl_predict",
        description="Segment a folder of scans, or single scans. Masks get the names of the cases.",
    )
    add = parser.add_argument
    add("-i", nargs="+", required=True, metavar="INPUT", type=Path, help="folder of scans, or scans. Names as in "
        "nnU-Net (CASE_0000.nii.gz); if one file holds all channels, CASE.nii.gz will do")  # fmt: skip
    add("-o", required=True, metavar="FOLDER", type=Path, help="folder for the masks")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("-d", metavar="DATASET", help="data set (id or name) of the trained model")
    which.add_argument("-m", metavar="FOLDER", type=Path, help="model folder, instead of -d, -tr, -p and -c")
    add("-tr", metavar="TRAINER", help="trainer. Default: the one that was trained")
    add("-p", metavar="PLANS", help="plans. Default: nnSSLPlans if trained, else the only ones")
    add("-c", metavar="CONFIGURATION", help="configuration. Default: 3d_fullres if trained, else 2d, else the only one")
    add("-f", nargs="+", metavar="FOLD", help="folds to average. Default: all finished ones")
    add("-chk", default="checkpoint_final.pth", help="checkpoint in each fold. Default: checkpoint_final.pth")
    add("-step_size", type=float, default=0.5, help="distance of neighboring windows as a fraction of the patch size, "
        "at most 1. Larger is faster and less accurate. Default: 0.5")  # fmt: skip
    add("--disable_tta", action="store_true", help="no averaging over mirrored scans: faster, less accurate")
    add("--save_probabilities", action="store_true", help="write class probabilities (.npz) too, for ensembling")
    add("--save_uncertainty", action="store_true", help="write maps of the uncertainty (.nii.gz) and estimates of the "
        "quality of every mask (quality.csv) into OUTPUT/uncertainty. Predicts with the teacher or second network of "
        "the checkpoint, too, where there is one")  # fmt: skip
    add("--continue_prediction", action="store_true", help="leave out cases that are already done, unless "
        "their scans have changed; with another model or checkpoint this is refused")  # fmt: skip
    add("-prev_stage_predictions", metavar="FOLDER", type=Path, help="masks of the first stage; cascades need them")
    add("-npp", type=int, default=_from_environment("nnUNet_npp"), help="processes for preprocessing, 0 for none. "
        "Default: 3 with a GPU and several cases, else 0 (or the environment variable nnUNet_npp)")  # fmt: skip
    add("-nps", type=int, default=_from_environment("nnUNet_nps"), help="processes for writing, 0 for none. "
        "Default: as -npp (environment variable nnUNet_nps)")  # fmt: skip
    add("-num_parts", type=int, default=1, help="number of runs that share the cases. Default: 1")
    add("-part_id", type=int, default=0, help="which of these runs this is, from 0. Default: 0")
    add("-device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is a device, else cpu. One of several "
        "GPUs is chosen with CUDA_VISIBLE_DEVICES")  # fmt: skip
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto", help="number format of the network. "
        "Default: fp16 on CUDA, bf16 on CPUs that have it, else fp32")  # fmt: skip
    add("--memory-format", choices=["auto", "contiguous", "channels_last"], default="auto", help="contiguous gives "
        "nnU-Net's results to the bit, channels_last to rounding. Default: channels_last on CPUs in fp32, where it is "
        "faster, else contiguous")  # fmt: skip
    add("--not_on_device", action="store_true", help="collect results in main memory if the GPU's is too small")
    add("--trust_checkpoint", action="store_true", help="let the checkpoint run code while it is read. Only for files "
        "that you trust as you would trust a program")  # fmt: skip
    add("--allow_suspicious", action="store_true", help="take NaN and infinite values in NIfTI files for 0, as "
        "a training on such scans did (flag of nnssl_plan_and_preprocess). Default: such a case fails")  # fmt: skip
    add("--verbose", action="store_true", help="messages of nnU-Net, and tracebacks of failed cases")
    add("--disable_progress_bar", action="store_true", help="no progress bars, for batch jobs")
    return parser


def _from_environment(variable: str) -> int | None:
    value = os.environ.get(variable)
    return int(value) if value and value.isdigit() else None


def main(argv: list[str]) -> int | None:
    parser = _parser()
    args = parser.parse_args(argv)
    model = selected_model(parser, args)

    from nnssl.inference.run import PredictionOptions, predict

    options = PredictionOptions(
        device=args.device,
        precision=args.precision,
        memory_format=args.memory_format,
        step_size=args.step_size,
        mirroring=not args.disable_tta,
        save_probabilities=args.save_probabilities,
        save_uncertainty=args.save_uncertainty,
        continue_prediction=args.continue_prediction,
        previous_stage=args.prev_stage_predictions,
        num_parts=args.num_parts,
        part_id=args.part_id,
        preprocessing_workers=args.npp,
        export_workers=args.nps,
        on_device=not args.not_on_device,
        trust_checkpoint=args.trust_checkpoint,
        allow_suspicious=args.allow_suspicious,
        verbose=args.verbose,
        progress=not args.disable_progress_bar,
    )
    print(predict(args.i, args.o, model, options))
    return 0
