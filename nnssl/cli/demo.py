"""``nnssl_demo``: the whole way on a phantom data set, or on the user's own folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str]) -> int | None:
    args = _parser().parse_args(argv)

    from nnssl.benchmark.demo import run_demo
    from nnssl.benchmark.demo_plan import DemoSettings
    from nnssl.inference.device import choose_device

    settings = DemoSettings(
        output=args.o,
        data=args.data,
        channel_names=tuple(args.channel_names) if args.channel_names else None,
        labeled=args.labeled,
        trainers=tuple(args.trainers),
        epochs=args.epochs,
        iterations_per_epoch=args.iterations_per_epoch,
        overrides=tuple(args.set),
        device=choose_device(args.device).type,
        seed=args.seed,
        processes=args.np,
    )
    print(f"\n{run_demo(settings)}")
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnssl_demo",
        description="Runs the whole way with the commands that you would type: data, plan and preprocessing, training, "
        "prediction and evaluation with each method, a table and a picture. Without --data on a phantom data set that "
        "is made on the spot. A second run with the same flags does only what is left.",
    )
    add = parser.add_argument
    add("-o", type=Path, default=Path("demo_output"), metavar="FOLDER", help="output folder (default: ./demo_output)")
    add(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="your own fully labeled data: a folder with images/ and labels/ (optional: split.json with train and "
        "test), or an nnU-Net raw data set. All labels but those of a few cases are hidden from the training",
    )
    add(
        "--channel-names",
        nargs="+",
        metavar="NAME",
        help="name per channel of --data; CT is normalized as CT, any other name per image (default: image)",
    )
    add("--labeled", type=int, default=3, metavar="N", help="number of labeled cases (default: 3)")
    add(
        "--trainers",
        nargs="+",
        default=["Supervised", "MeanTeacher"],
        metavar="TRAINER",
        help="methods to compare (default: Supervised MeanTeacher)",
    )
    add("--epochs", type=int, default=10, help="epochs of each training (default: 10)")
    add("--iterations-per-epoch", type=int, default=25, help="steps per epoch (default: 25)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="hyper-parameter of each training; repeatable (default: initial_lr=4e-3 with a shorter online validation)",
    )
    add("-device", choices=("cuda", "cpu", "mps"), help="default: cuda if there is one, else cpu")
    add("--seed", type=int, default=0, help="seed of the data and of the trainings (default: 0)")
    add("-np", type=int, default=2, metavar="N", help="processes for preprocessing (default: 2)")
    return parser
