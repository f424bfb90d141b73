"""Cost of a training step: stock nnU-Net and nnssl trainers on the same plan, interleaved in one run.

    python benchmarks/step_time.py -d 4 -p nnSSLCPUPlans -c 3d_fullres

Without ``--trainers`` stock nnU-Net and all trainers of the registry are timed. Every trainer gets its own streams and
runs in blocks of steps, in turn, so that drifts of the machine hit all alike; medians over the blocks are printed.
The floor is the arithmetic of the method's step: its floating-point operations, backward pass included, in units of
the student's forward pass on the labeled batch, times the measured seconds of that pass in the same precision and
memory format, taken after each block. A forward and backward pass comes out as 3 forward passes, a pass without
gradient as 1.

With ``--threads 1 2 4`` every trainer is timed with each number of threads, on a CPU.

Steps are those of a method's main phase; `SelfTraining`, whose later rounds need pseudo-labels, is timed in round 0.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import Any

# read when torch is loaded, as the commands do
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch.utils.flop_counter import FlopCounterMode

from nnssl.networks.unwrap import unwrap
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.request import prepare_device
from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.registry import get_trainer, trainer_names
from nnssl.utils.files import read_json, write_json
from nnssl.utils.paths import dataset_name, preprocessed_folder


def main() -> None:
    arguments = _parser().parse_args()
    device = prepare_device(arguments.device)
    started = {label: _start(label, arguments, device) for label in arguments.trainers}
    threads = dict.fromkeys(started, torch.get_num_threads())
    if arguments.threads:
        threads = {f"{label}, {number} thr.": number for label in started for number in arguments.threads}
    trainers = {label: started[label.rsplit(",", 1)[0]] for label in threads}
    blocks: dict[str, list[dict[str, float]]] = {label: [] for label in trainers}
    for block in range(arguments.blocks + 1):
        for label, trainer in trainers.items():
            torch.set_num_threads(threads[label])
            measured = _time_block(trainer, arguments.steps, device)
            measured["forward"] = _forward_seconds(trainer, device)
            if block > 0:  # the first block warms up: caches, compilation, filled queues
                blocks[label].append(measured)
    batches = {label: next(trainer.dataloader_train) for label, trainer in trainers.items()}
    for trainer in started.values():
        _close_streams(trainer)  # their workers would be waited for at the end
    rows = [_row(label, trainers[label], batches[label], blocks[label], device) for label in trainers]
    _print(rows, device)
    if arguments.o:
        environment = {
            "torch": torch.__version__,
            "threads": arguments.threads or torch.get_num_threads(),
            "device": str(device),
        }
        write_json({"arguments": vars(arguments), "environment": environment, "rows": rows}, arguments.o)


def _start(label: str, arguments: argparse.Namespace, device: torch.device) -> Any:
    """A trainer with open streams; ``Supervised:fp32`` names a trainer and its precision, ``+compile`` compiles it."""
    compiled = label.endswith("+compile")
    name, _, precision = label.removesuffix("+compile").partition(":")
    base = preprocessed_folder() / dataset_name(arguments.d)
    plans = read_json(base / f"{arguments.p}.json") | {"continue_training": False}
    trainer = get_trainer(name)(plans, arguments.c, arguments.fold, read_json(base / "dataset.json"), device)
    if isinstance(trainer, SemiSupervisedTrainer):
        # steps of the main phase
        trainer.configure({"pretrain_share": 0.0}, RunSettings(seed=0, precision=precision or "auto"))
    if compiled:
        trainer._do_i_compile = lambda: True
    trainer.on_train_start()
    trainer.network.train()
    return trainer


def _time_block(trainer: Any, steps: int, device: torch.device) -> dict[str, float]:
    waited = 0.0
    start = time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(trainer.dataloader_train)
        waited += time.perf_counter() - asked
        trainer.train_step(batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"step": (time.perf_counter() - start) / steps, "wait": waited / steps}


def _close_streams(trainer: Any) -> None:
    """Ends the workers."""
    for stream in (trainer.dataloader_train, trainer.dataloader_val):
        if hasattr(stream, "close"):
            stream.close()
        elif hasattr(stream, "_finish"):
            stream._finish()


def _row(
    label: str, trainer: Any, batch: dict[str, Any], blocks: list[dict[str, float]], device: torch.device
) -> dict[str, Any]:
    step = statistics.median(block["step"] for block in blocks)
    semi = isinstance(trainer, SemiSupervisedTrainer)
    passes = _passes(trainer, batch, device)
    return {
        "trainer": label,
        "precision": trainer.precision.name if semi else ("fp16" if device.type == "cuda" else "fp32"),
        "patches": f"{trainer.batch_size}+{trainer.num_unlabeled if semi else 0}",
        "step_ms": 1000 * step,
        "fastest_ms": 1000 * min(block["step"] for block in blocks),
        "slowest_ms": 1000 * max(block["step"] for block in blocks),
        "wait_ms": 1000 * statistics.median(block["wait"] for block in blocks),
        "passes": passes,
        "floor_ms": 1000 * passes * statistics.median(block["forward"] for block in blocks),
    }


def _passes(trainer: Any, batch: dict[str, Any], device: torch.device) -> float:
    """Floating-point operations of a step in units of those of a forward pass on the labeled batch."""
    with FlopCounterMode(display=False) as step:
        trainer.train_step(batch)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        unwrap(trainer.network)(_images(trainer, trainer.batch_size).to(device))
    return step.get_total_flops() / forward.get_total_flops()


def _images(trainer: Any, patches: int) -> torch.Tensor:
    return torch.randn(patches, trainer.num_input_channels, *trainer.configuration_manager.patch_size)


def _forward_seconds(trainer: Any, device: torch.device) -> float:
    """Median seconds of a forward pass of the student on the labeled batch, without gradient."""
    images = _images(trainer, trainer.batch_size).to(device)
    network = unwrap(trainer.network)
    semi = isinstance(trainer, SemiSupervisedTrainer)
    times = []
    with torch.no_grad():
        for _ in range(4):
            start = time.perf_counter()
            if semi:
                trainer.heads(network, images)
            else:
                with torch.autocast(device.type, enabled=device.type == "cuda"):
                    network(images)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _print(rows: list[dict[str, Any]], device: torch.device) -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"\n{device}, {cores} cores, torch {torch.__version__}; medians, ms per step; ratio to the first row")
    print(f"{'trainer':<30}{'precision':<10}{'patches':<9}{'step':>9}{'range':>17}{'wait':>8}{'passes':>8}{'floor':>9}"
          f"{'x floor':>9}{'ratio':>8}")  # fmt: skip
    for row in rows:
        spread = f"{row['fastest_ms']:.1f}-{row['slowest_ms']:.1f}"
        step, floor = row["step_ms"], row["floor_ms"]
        print(
            f"{row['trainer']:<30}{row['precision']:<10}{row['patches']:<9}{step:>9.1f}{spread:>17}{row['wait_ms']:>8.1f}"
            f"{row['passes']:>8.2f}{floor:>9.1f}{step / floor:>9.2f}{step / rows[0]['step_ms']:>8.2f}"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-d", required=True, help="data set name or id, planned and preprocessed")
    add("-p", default="nnSSLPlans", help="plans identifier")
    add("-c", default="3d_fullres", help="configuration")
    add("-device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    add("--fold", default="all", help="fold (default: all)")
    add(
        "--trainers",
        nargs="+",
        metavar="NAME[:PRECISION][+compile]",
        default=["nnUNetTrainer", *trainer_names()],
        help="default: nnUNetTrainer and all of the registry",
    )
    add("--threads", type=int, nargs="+", metavar="N", help="numbers of threads to compare (default: one per core)")
    add("--steps", type=int, default=20, help="steps per block")
    add("--blocks", type=int, default=7, help="blocks per trainer, after one to warm up")
    add("-o", type=Path, help="JSON file for the figures")
    return parser


if __name__ == "__main__":
    main()
