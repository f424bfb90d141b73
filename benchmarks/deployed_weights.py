"""Which weights should predict: those of the last step, an exponential average, or the mean of the last epochs?

    python benchmarks/deployed_weights.py -o RUNS --data DATA --core 0
    python benchmarks/deployed_weights.py -o RUNS --data DATA --table

One training gives all three, so that they differ in nothing else; scored on validation cases from the training pools.
Jobs as in jobs.py, but a training that is interrupted starts again.
"""

from __future__ import annotations

import argparse
import os
import shutil
from itertools import groupby
from pathlib import Path
from typing import Any

from jobs import Job, claimed, main, prepared, result, steps_and_minutes
from recipe import ATRIUM, ATRIUM_EPOCHS, EPOCHS, POOLS, STEPS_PER_EPOCH
from short_budgets import BRIEF

from nnssl.benchmark.steps import run_program
from nnssl.utils.files import read_json, write_json

LAST, EMA, MEAN = "last step", "EMA 0.99", "mean of the last 3 epochs"
EMA_DECAY, EPOCHS_OF_MEAN = 0.99, 3
SETS = {**dict.fromkeys(POOLS, EPOCHS), ATRIUM: ATRIUM_EPOCHS}


def jobs() -> list[Job]:
    """Rows of the tables; those with the same data set, trainer and seed come from one training."""
    return [
        Job(
            f"{trainer}, {weights}",
            pool,
            trainer,
            seed,
            epochs,
            STEPS_PER_EPOCH,
            (BRIEF,),
            table=f"{pool.name}, weights",
        )
        for seed in (0, 1)
        for pool, epochs in SETS.items()
        for trainer in ("Supervised", "MeanTeacher")
        for weights in (LAST, EMA, MEAN)
    ]


def run_together(rows: list[Job], folder: Path, data: Path) -> None:
    """One training, and the results of all its rows."""
    files = [folder / "results" / f"{row.key}.json" for row in rows]
    with claimed(files[0]) as mine:
        if not mine or all(file.is_file() for file in files):
            return
        results = folder / "runs" / rows[0].key
        environment = prepared(rows[0].dataset, folder, data) | {"nnUNet_results": str(results)}
        fold, seed, epochs = rows[0].dataset.fold, str(rows[0].seed), str(rows[0].epochs)
        run_program([__file__, "--train", rows[0].trainer, fold, seed, epochs], environment)
        (trained,) = results.glob(f"*/*/fold_{fold}")
        for row, file in zip(rows, files, strict=True):
            summary = read_json(trained / f"validation, {row.row.partition(', ')[2]}" / "summary.json")
            write_json(result(row, *steps_and_minutes(trained), summary), file)


def train(name: str, fold: str, seed: int, epochs: int) -> None:
    """Trains, and validates with each of the weights."""
    import torch

    from nnssl.losses.schedules import ema_decay_with_warmup
    from nnssl.networks.ema import EMATeacher
    from nnssl.networks.unwrap import unwrap
    from nnssl.trainers.engine.request import prepare_device
    from nnssl.trainers.engine.run_settings import RunSettings
    from nnssl.trainers.registry import get_trainer
    from nnssl.utils.paths import dataset_name, preprocessed_folder

    base = preprocessed_folder() / dataset_name("1")
    plans = read_json(base / "nnSSLCPUPlans.json") | {"continue_training": False}
    device = prepare_device("cpu")
    trainer: Any = get_trainer(name)(plans, "3d_fullres", int(fold), read_json(base / "dataset.json"), device)
    budget = {"num_epochs": epochs, "num_iterations_per_epoch": STEPS_PER_EPOCH, "num_val_iterations_per_epoch": 1}
    trainer.configure(budget, RunSettings(seed=seed, preview_every=0))
    trainer.initialize()
    trainer.disable_checkpointing = True
    averages = {EMA: EMATeacher(unwrap(trainer.network)), MEAN: EMATeacher(unwrap(trainer.network))}
    after_step = trainer.after_step

    def average(step: Any) -> None:
        after_step(step)
        student = unwrap(trainer.network)
        averages[EMA].update(student, ema_decay_with_warmup(step.iteration, EMA_DECAY))
        epoch, rest = divmod(trainer.iteration, STEPS_PER_EPOCH)
        number = epoch - epochs + EPOCHS_OF_MEAN
        if rest == 0 and number > 0:
            averages[MEAN].update(student, 1 - 1 / number)

    trainer.after_step = average
    trainer.run_training()
    networks: dict[str, torch.nn.Module] = {LAST: unwrap(trainer.network)}
    networks |= {weights: teacher.network for weights, teacher in averages.items()}
    folder = Path(trainer.output_folder)
    for weights, network in networks.items():
        trainer.deployed_network = lambda network=network: network
        trainer.perform_actual_validation()
        target = folder / f"validation, {weights}"
        shutil.rmtree(target, ignore_errors=True)
        (folder / "validation").rename(target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--train", nargs=4)
    parser.add_argument("-o", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--core", type=int)
    arguments, others = parser.parse_known_args()
    if arguments.train:
        name, fold, seed, epochs = arguments.train
        train(name, fold, int(seed), int(epochs))
    elif arguments.data is None or others:
        main(jobs(), __doc__, baseline=f"Supervised, {LAST}")
    else:
        if arguments.core is not None:
            os.sched_setaffinity(0, {arguments.core})
        for _, rows in groupby(jobs(), lambda job: (job.dataset.name, job.trainer, job.seed)):
            run_together(list(rows), arguments.o.absolute(), arguments.data.absolute())
