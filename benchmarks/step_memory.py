"""Estimated and measured peak memory of training steps on a CPU, each in a process of its own.

    python benchmarks/step_memory.py -d 4 -p nnSSLCPUPlans

Measured is by how much the resident memory of the process grows during three steps on random patches, from the
initialized trainer on; estimated is what ``nnssl_train`` takes for that before it starts. The plan is varied: features
and patch size by factors, number format, memory format, micro-batches.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# read when torch is loaded, as the commands do
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

MIB = 1024**2
STEPS = 3
NAMES = ("configuration", "trainer", "features", "patch", "precision", "layout", "micro_batch")
# features and patch are factors of the plan's
CASES = (
    ("3d_fullres", "Supervised", 1, 1, "fp32", "channels_last", None),
    ("3d_fullres", "MeanTeacher", 1, 1, "fp32", "channels_last", None),
    ("3d_fullres", "MeanTeacher", 1, 1, "fp32", "channels_last", 1),
    ("3d_fullres", "MeanTeacher", 4, 1, "fp32", "channels_last", None),
    ("3d_fullres", "MeanTeacher", 4, 1, "fp32", "channels_last", 2),
    ("3d_fullres", "MeanTeacher", 4, 1, "fp32", "channels_last", 1),
    ("3d_fullres", "MeanTeacher", 4, 1, "fp32", "contiguous", None),
    ("3d_fullres", "MeanTeacher", 1, 2, "fp32", "channels_last", None),
    ("3d_fullres", "MeanTeacher", 1, 2, "fp32", "channels_last", 2),
    ("3d_fullres", "MeanTeacher", 1, 2, "fp32", "contiguous", None),
    ("2d", "Supervised", 4, 8, "fp32", "channels_last", None),
    ("2d", "MeanTeacher", 4, 8, "fp32", "channels_last", None),
    ("2d", "MeanTeacher", 4, 8, "fp32", "contiguous", None),
    ("3d_fullres", "Supervised", 1, 1, "bf16", "channels_last", None),
    ("3d_fullres", "MeanTeacher", 1, 1, "bf16", "channels_last", None),
    ("3d_fullres", "MeanTeacher", 4, 1, "bf16", "channels_last", None),
    ("3d_fullres", "MeanTeacher", 4, 1, "bf16", "channels_last", 2),
    ("3d_fullres", "MeanTeacher", 4, 1, "bf16", "contiguous", None),
    ("3d_fullres", "MeanTeacher", 1, 2, "bf16", "channels_last", None),
    ("3d_fullres", "MeanTeacher", 1, 2, "bf16", "contiguous", None),
    ("2d", "MeanTeacher", 4, 8, "bf16", "channels_last", None),
)


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.one:
        print(json.dumps(_measure(arguments, dict(zip(NAMES, json.loads(arguments.one), strict=True)))))
        return
    print(
        "| configuration | trainer | features | patches | format | layout | micro-batch "
        "| estimated MiB | measured MiB | ratio | CPU s of the estimate |"
    )
    print("|---" * 11 + "|")
    for case in CASES:
        if arguments.precision not in (None, case[NAMES.index("precision")]):
            continue
        command = [sys.executable, *sys.argv, "--one", json.dumps(case)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        estimated, measured = row["estimated"] / MIB, row["measured"] / MIB
        cells = [*row["cells"], f"{estimated:.0f}", f"{measured:.0f}", f"{estimated / measured:.2f}"]
        print("| " + " | ".join([*cells, f"{row['seconds']:.1f}"]) + " |", flush=True)


def _measure(arguments: argparse.Namespace, case: dict[str, Any]) -> dict[str, Any]:
    import torch

    from nnssl.trainers.engine.rehearsal import _batch, rehearse

    trainer = _trainer(arguments, case)
    start = time.process_time()
    estimate = rehearse(trainer)
    seconds = time.process_time() - start
    trainer.network.train()
    batch = {
        key: torch.randn(value.shape) if isinstance(value, torch.Tensor) else value
        for key, value in _batch(trainer).items()
    }
    batch["target"] = [target.random_(0, 2) for target in batch["target"]]
    # peak of what follows, not of the imports
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(STEPS):
        trainer.train_step(batch)
    return {
        "cells": [
            case["configuration"],
            case["trainer"],
            str(trainer.configuration_manager.configuration["architecture"]["arch_kwargs"]["features_per_stage"][0]),
            f"{trainer.batch_size} + {trainer.num_unlabeled} of "
            + "x".join(map(str, trainer.configuration_manager.patch_size)),
            case["precision"],
            case["layout"],
            str(case["micro_batch"] or "-"),
        ],
        "estimated": estimate.total - estimate.held,
        "measured": _status("VmHWM") - before,
        "seconds": seconds,
    }


def _trainer(arguments: argparse.Namespace, case: dict[str, Any]) -> Any:
    import contextlib

    from nnssl.trainers.engine.request import prepare_device
    from nnssl.trainers.engine.run_settings import RunSettings
    from nnssl.trainers.registry import get_trainer
    from nnssl.utils.files import read_json
    from nnssl.utils.paths import dataset_name, preprocessed_folder

    base = preprocessed_folder() / dataset_name(arguments.d)
    plans = read_json(base / f"{arguments.p}.json")
    plan = plans["configurations"][case["configuration"]]
    plan["patch_size"] = [case["patch"] * n for n in plan["patch_size"]]
    # no case is read, so that one preprocessed configuration suffices
    plan["data_identifier"] = plans["configurations"]["3d_fullres"]["data_identifier"]
    layers = plan["architecture"]["arch_kwargs"]
    layers["features_per_stage"] = [case["features"] * n for n in layers["features_per_stage"]]
    with contextlib.redirect_stdout(sys.stderr):
        trainer = get_trainer(case["trainer"])(
            plans, case["configuration"], "all", read_json(base / "dataset.json"), prepare_device("cpu")
        )
        settings = RunSettings(0, precision=case["precision"], memory_format=case["layout"])
        settings.micro_batch = case["micro_batch"]
        trainer.configure({}, settings)
        trainer.initialize()
    return trainer


def _status(name: str) -> int:
    """A size of this process, in bytes, from the kernel."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-d", required=True, help="data set name or id, planned")
    add("-p", default="nnSSLCPUPlans", help="plans identifier")
    add("--precision", choices=("fp32", "bf16"), help="only these rows")
    add("--one", metavar="JSON", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
