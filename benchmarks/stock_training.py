"""Trains with nnU-Net's own trainer, for a number of steps that its command cannot be told.

    python benchmarks/stock_training.py 1 all -p nnSSLCPUPlans -c 3d_fullres --epochs 10 --iterations-per-epoch 40

Nothing but the lengths of training and online validation is changed. It continues from nnU-Net's last checkpoint.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path

import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("fold")
    parser.add_argument("-p", required=True, metavar="PLANS")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION")
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--iterations-per-epoch", type=int, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    fold = arguments.fold if arguments.fold == "all" else int(arguments.fold)
    device = torch.device("cpu")
    trainer = get_trainer_from_args(arguments.dataset, arguments.c, fold, "nnUNetTrainer", arguments.p, device=device)
    trainer.num_epochs = arguments.epochs
    trainer.num_iterations_per_epoch = arguments.iterations_per_epoch
    trainer.num_val_iterations_per_epoch = 1
    trainer.save_every = 5
    checkpoints = [Path(trainer.output_folder, f"checkpoint_{name}.pth").is_file() for name in ("final", "latest")]
    if any(checkpoints):
        maybe_load_checkpoint(trainer, True, False)
    if trainer.current_epoch < trainer.num_epochs:
        trainer.run_training()
    names = ("epoch_end_timestamps", "epoch_start_timestamps")
    ends, starts = (trainer.logger.get_value(name, step=None) for name in names)
    steps = arguments.iterations_per_epoch
    rows = [
        [steps * (epoch + 1), (end - start) / steps]
        for epoch, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    with open(Path(trainer.output_folder, "curves.csv"), "w", newline="") as file:
        csv.writer(file).writerows([["iteration", "step_seconds"], *rows])


if __name__ == "__main__":
    main()
