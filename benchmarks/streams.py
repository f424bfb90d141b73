"""Cost of the streams: milliseconds of one augmented patch, and memory with few and with many unlabeled cases.

    python benchmarks/streams.py time -d 4 -p nnSSLCPUPlans
    python benchmarks/streams.py memory -d 4 -p nnSSLCPUPlans --cases 50 5000

``time`` makes patches in this process with one thread, stock nnU-Net's labeled loader and nnssl's two streams in turn.
``memory`` trains MeanTeacher on copies of the preprocessed data set whose unlabeled cases are links to the real ones,
and samples the memory of the training and its workers (proportional set size: shared pages are counted once).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nnssl.trainers.engine.run_settings import RunSettings
from nnssl.trainers.registry import get_trainer
from nnssl.utils.files import read_json
from nnssl.utils.paths import dataset_name, preprocessed_folder

INTERVAL_SECONDS = 1.0


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.what == "time":
        _time(arguments)
    else:
        _memory(arguments)


def _time(arguments: argparse.Namespace) -> None:
    # batches are made here, when they are asked for
    os.environ["nnUNet_n_proc_DA"] = "0"
    torch.set_num_threads(1)
    stock, ours = (_trainer(name, arguments) for name in ("nnUNetTrainer", "MeanTeacher"))
    labeled = ours.dataloader_train.labeled
    unlabeled = ours.dataloader_train.unlabeled
    streams = {
        "nnU-Net, labeled": (stock.dataloader_train, stock.batch_size),
        "nnssl, labeled": (labeled, ours.batch_size),
        "nnssl, unlabeled": (unlabeled, ours.num_unlabeled),
    }
    seconds: dict[str, list[float]] = {name: [] for name in streams}
    for round_number in range(arguments.rounds + 1):
        for name, (stream, patches) in streams.items():
            start = time.process_time()
            for _ in range(arguments.batches):
                next(stream)
            if round_number > 0:
                seconds[name].append((time.process_time() - start) / (arguments.batches * patches))
    reference = statistics.median(seconds["nnU-Net, labeled"])
    print(f"\nCPU milliseconds per patch of {ours.configuration_manager.patch_size}, one thread, median of rounds")
    for name, values in seconds.items():
        middle = statistics.median(values)
        print(f"{name:<20}{1000 * middle:8.1f}  {1000 * min(values):.1f}-{1000 * max(values):.1f}"
              f"  {middle / reference:.2f} x stock")  # fmt: skip


def _trainer(name: str, arguments: argparse.Namespace) -> Any:
    base = preprocessed_folder() / dataset_name(arguments.d)
    plans = read_json(base / f"{arguments.p}.json") | {"continue_training": False}
    dataset_json = read_json(base / "dataset.json")
    trainer = get_trainer(name)(plans, arguments.c, "all", dataset_json, torch.device("cpu"))
    if name != "nnUNetTrainer":
        trainer.configure({}, RunSettings(seed=0))
    trainer.on_train_start()
    return trainer


def _memory(arguments: argparse.Namespace) -> None:
    source = preprocessed_folder() / dataset_name(arguments.d)
    print(f"{'unlabeled cases':>16}{'peak MiB':>10}{'end MiB':>10}")
    for cases in arguments.cases:
        with tempfile.TemporaryDirectory(prefix=".streams_", dir=arguments.scratch) as scratch:
            environment = _data_set(source, Path(scratch), cases, arguments.p)
            command = [sys.executable, "-m", "nnssl", "train", source.name, "MeanTeacher", "all", "-p", arguments.p]
            command += ["-c", arguments.c, "-device", "cpu", "--epochs", "4", "--disable_checkpointing"]
            command += ["--iterations-per-epoch", str(arguments.steps // 4), "--seed", "0"]
            process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.DEVNULL)
            samples = [0.0]
            while process.poll() is None:
                samples.append(_tree_mebibytes(process.pid) or samples[-1])
                time.sleep(INTERVAL_SECONDS)
            if process.returncode:
                sys.exit(f"the training with {cases} unlabeled cases failed")
        # the last second belongs to the shutdown
        print(f"{cases:>16}{max(samples):>10.0f}{statistics.median(samples[-8:-2]):>10.0f}", flush=True)


def _data_set(source: Path, scratch: Path, cases: int, plans: str) -> dict[str, str]:
    """Copy of a preprocessed data set by links, with ``cases`` unlabeled cases; returns the variables to use it."""
    target = scratch / "preprocessed" / source.name
    target.mkdir(parents=True)
    for entry in source.iterdir():
        if entry.is_file():
            shutil.copy(entry, target)
        elif not entry.name.endswith("_unlabeled"):
            (target / entry.name).symlink_to(entry)
    for folder in source.glob("*_unlabeled"):
        (target / folder.name).mkdir()
        names = sorted(path.name.split(".")[0] for path in folder.glob("*.pkl"))
        for number in range(cases):
            original = names[number % len(names)]
            for path in folder.glob(f"{original}[._]*"):
                (target / folder.name / path.name.replace(original, f"link{number:05d}", 1)).symlink_to(path)
    (target / "splits_final.json").unlink(missing_ok=True)
    (scratch / "results").mkdir()
    return {"nnUNet_preprocessed": str(target.parent), "nnUNet_results": str(scratch / "results")}


def _tree_mebibytes(root: int) -> float | None:
    """Proportional set size of a process and its descendants, None while it starts or ends."""
    try:
        parents = {
            int(path.name): int(path.joinpath("stat").read_text().rpartition(")")[2].split()[1])
            for path in Path("/proc").iterdir()
            if path.name.isdigit()
        }
        family = {root}
        while True:
            grown = family | {child for child, parent in parents.items() if parent in family}
            if grown == family:
                break
            family = grown
        total = 0
        for process in family:
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        return total / 1024
    except (OSError, IndexError):
        return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("what", choices=("time", "memory"))
    add("-d", required=True, help="data set name or id, planned and preprocessed")
    add("-p", default="nnSSLPlans", help="plans identifier")
    add("-c", default="3d_fullres", help="configuration")
    add("--batches", type=int, default=20, help="time: batches per round")
    add("--rounds", type=int, default=30, help="time: rounds, after one to warm up; few tell how many were rotated")
    add("--cases", type=int, nargs="+", default=[50, 5000], help="memory: numbers of unlabeled cases")
    add("--steps", type=int, default=80, help="memory: training steps")
    add("--scratch", type=Path, help="memory: folder for the copies (default: the system's)")
    return parser


if __name__ == "__main__":
    main()
