"""Trainings of benchmarks as jobs that are queued, interrupted and continued.

A benchmark script lists data sets and jobs and calls `main`. Every job plans, trains, predicts and evaluates with the
commands that users type, and leaves one JSON file; a job that has one is not run again, one that was interrupted goes
on from its checkpoint. Several processes may work on the same queue, for instance one per core::

    python benchmarks/methods.py -o RUNS --data DATA --core 0 &
    python benchmarks/methods.py -o RUNS --data DATA --core 1
    python benchmarks/methods.py -o RUNS --data DATA --table
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import nnssl
from nnssl.benchmark.steps import run_command, run_program
from nnssl.errors import UserError
from nnssl.evaluation.statistics import bootstrap_interval
from nnssl.utils.files import write_json

REGISTERED = "REGISTERED"
"""Takes the place of the folder with registered labels in the command of a job."""
MEASURES = ("Dice", "IoU", "HD95", "ASSD")


@dataclass(frozen=True)
class DataSet:
    """A label budget, in nnU-Net folders of its own.

    Attributes:
        name: unique; also the name of its folder.
        source: folder below ``--data`` with images/ and labels/.
        labeled: number of labeled cases.
        draw: seed of their draw.
        validation: number of further labeled cases to score on; 0 scores on the test cases.
        source_flags: further flags of nnssl_split.
        plan_flags: further flags of nnssl_plan_and_preprocess.
        configuration: of the plan.
    """

    name: str
    source: str
    labeled: int
    draw: int = 0
    validation: int = 0
    source_flags: tuple[str, ...] = ("--channel-names", "MRI")
    plan_flags: tuple[str, ...] = ()
    configuration: str = "3d_fullres"

    @property
    def fold(self) -> str:
        return "0" if self.validation else "all"


@dataclass(frozen=True)
class Job:
    """One training of one row of a table.

    Attributes:
        row: what the table calls it.
        dataset: what it is trained on.
        trainer: method, nnUNetTrainer, which is stock nnU-Net (seed and overrides do not reach it), or
            AtlasRegistration, which is not trained (only flags, those of nnssl_atlas_predict, reach it).
        seed: of the training.
        epochs, iterations: budget; ``iterations`` per epoch. Not used if there are minutes.
        overrides: hyper-parameters as ``NAME=VALUE``.
        flags: further flags of nnssl_train.
        table: heading of the table that the row belongs to; the name of the data set by default.
        minutes: budget instead of epochs, for as many steps as the method makes in them; not of stock nnU-Net.
        from_registration: whether the labels of the labeled cases, registered to each unlabeled one, are its initial
            pseudo-labels. The jobs of a data set share them.
    """

    row: str
    dataset: DataSet
    trainer: str
    seed: int
    epochs: int = 0
    iterations: int = 0
    overrides: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    table: str = ""
    minutes: float = 0
    from_registration: bool = False

    @property
    def heading(self) -> str:
        return self.table or self.dataset.name

    @property
    def stock(self) -> bool:
        """Whether nnU-Net's own trainer is trained."""
        return self.trainer == "nnUNetTrainer"

    @property
    def registers(self) -> bool:
        """Whether labeled cases are registered to the test cases instead of any training."""
        return self.trainer == "AtlasRegistration"

    @property
    def key(self) -> str:
        return f"{self.dataset.name}/{self.row}/seed_{self.seed}".replace(" ", "_")

    def train_words(self) -> list[str]:
        """Arguments of nnssl's command that trains, or registers, or of stock_training.py."""
        if self.registers:
            return ["atlas_predict", "-d", "1", "-np", "1", *self.flags]
        if self.stock:
            words = ["1", self.dataset.fold, "-p", "nnSSLCPUPlans", "-c", self.dataset.configuration]
            return [*words, "--epochs", str(self.epochs), "--iterations-per-epoch", str(self.iterations)]
        words = ["train", "1", self.trainer, self.dataset.fold, "-p", "nnSSLCPUPlans", "-c", self.dataset.configuration]
        budget = ["--epochs", str(self.epochs), "--iterations-per-epoch", str(self.iterations)]
        words += ["-device", "cpu", *(["--minutes", f"{self.minutes:g}"] if self.minutes else budget)]
        words += ["--seed", str(self.seed), *self.flags]
        words += [word for override in self.overrides for word in ("--set", override)]
        return [*words, "--set", f"initial_pseudo_labels={REGISTERED}"] if self.from_registration else words


def main(jobs: Sequence[Job], description: str, baseline: str, ceiling: str | None = None) -> None:
    """Runs the queue, or prints its table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="where everything goes")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of the data sets")
    parser.add_argument("--core", type=int, help="run on this core only")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only jobs whose name contains one of these")
    parser.add_argument("--table", action="store_true", help="print the table of what is done")
    parser.add_argument("--baseline", default=baseline, metavar="ROW", help=f"of the table (default: {baseline})")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the report of what is done on test cases")
    arguments = parser.parse_args()
    chosen = [job for job in jobs if not arguments.only or any(text in job.key for text in arguments.only)]
    if arguments.table:
        print(table(chosen, arguments.o, arguments.baseline, ceiling))
        return
    if arguments.report is not None:
        report(chosen, arguments.o, arguments.report, ceiling)
        return
    if arguments.data is None:
        parser.error("--data is needed to run jobs")
    if arguments.core is not None:
        os.sched_setaffinity(0, {arguments.core})
    failed = []
    for job in chosen:
        try:
            run_job(job, arguments.o.absolute(), arguments.data.absolute())
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
            failed.append(job.key)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def report(jobs: Sequence[Job], folder: Path, file: Path, ceiling: str | None) -> None:
    """Writes the report (nnssl_report) of one table; ``--only`` chooses its rows."""
    done = [job for job in jobs if (folder / "results" / f"{job.key}.json").is_file() and not job.dataset.validation]
    headings = {job.heading for job in done}
    if len(headings) != 1:
        sys.exit(f"a report shows one table, choose with --only: {', '.join(sorted(headings)) or 'nothing is done'}")
    words = ["report", *(f"{job.row}={folder / 'runs' / job.key / 'predicted'}" for job in done), "-o", str(file)]
    if any(job.row == ceiling for job in done):
        words += ["--ceiling", str(ceiling)]
    run_command([*words, "--title", headings.pop()], {})


def run_job(job: Job, folder: Path, data: Path) -> None:
    """Runs a job unless it is done or another process is at it.

    Raises:
        UserError: if a command fails, or if the job was done with other settings.
    """
    file = folder / "results" / f"{job.key}.json"
    with claimed(file) as mine:
        if not mine:
            return
        if file.is_file():
            found = json.loads(file.read_text())["command"]
            if found != job.train_words():
                raise UserError("a job was done with other settings", where=file, found=" ".join(found))
            return
        environment = prepared(job.dataset, folder, data) | {"nnUNet_results": str(folder / "runs" / job.key)}
        if job.registers:
            write_json(result(job, 0, 0.0, json.loads(_test(job, folder, environment).read_text())), file)
            return
        if job.stock:
            run_program([str(Path(__file__).with_name("stock_training.py")), *job.train_words()], environment)
        else:
            words = job.train_words()
            if job.from_registration:
                registered = str(_registered(job.dataset, folder, environment))
                words = [word.replace(REGISTERED, registered) for word in words]
            # --c starts a new training where there is nothing to continue
            run_command([*words, "--c"], environment)
        (trained,) = (folder / "runs" / job.key).glob(f"*/*/fold_{job.dataset.fold}")
        if not (trained / "checkpoint_final.pth").is_file():
            sys.exit(f"{job.key} was stopped; the same command goes on")
        summary = trained / "validation" / "summary.json"
        if not job.dataset.validation:
            summary = _test(job, folder, environment)
        write_json(result(job, *steps_and_minutes(trained), json.loads(summary.read_text())), file)


def _test(job: Job, folder: Path, environment: dict[str, str]) -> Path:
    (raw,) = Path(environment["nnUNet_raw"]).glob("Dataset001_*")
    predicted = folder / "runs" / job.key / "predicted"
    if job.registers:
        words = [*job.train_words(), "--continue_prediction"]
    else:
        words = ["predict", "-d", "1", "-tr", job.trainer, "-p", "nnSSLCPUPlans", "-c", job.dataset.configuration]
        words += ["-f", "all", "-device", "cpu", "--continue_prediction", "--disable_progress_bar"]
    run_command([*words, "-i", str(raw / "imagesTs"), "-o", str(predicted)], environment)
    reference, summary = folder / "data" / job.dataset.name / "hidden" / "test", predicted / "summary.json"
    run_command(["evaluate", "-gt", str(reference), "-pred", str(predicted), "-o", str(summary)], environment)
    return summary


def prepared(dataset: DataSet, folder: Path, data: Path) -> dict[str, str]:
    """Makes and plans the data set unless that is done; environment variables for the commands."""
    base = folder / "data" / dataset.name
    environment = {f"nnUNet_{part}": str(base / part) for part in ("raw", "preprocessed")}
    environment |= {"nnUNet_results": str(base / "results"), "nnUNet_n_proc_DA": "1"}
    done = base / "planned.json"
    with claimed(done, wait=True):
        if not done.is_file():
            for variable in environment.values():
                if variable != "1":
                    Path(variable).mkdir(parents=True, exist_ok=True)
            split = ["split", str(data / dataset.source), "-d", "1", "-n", "Data", "--labeled", str(dataset.labeled)]
            split += ["--seed", str(dataset.draw), "--hidden-labels", str(base / "hidden"), "--overwrite"]
            if dataset.validation:
                split += ["--validation", str(dataset.validation)]
            plan = ["plan_and_preprocess", "-d", "1", "-pl", "nnSSLPlannerCPU", "-c", dataset.configuration]
            commands = [[*split, *dataset.source_flags], [*plan, *dataset.plan_flags]]
            for words in commands:
                run_command(words, environment)
            write_json({"commands": commands}, done)
    return environment


def _registered(dataset: DataSet, folder: Path, environment: dict[str, str]) -> Path:
    """Labels of the labeled cases, registered to the unlabeled ones unless that is done."""
    assert not dataset.validation, "labels of validation cases would be registered, too"
    target = folder / "data" / dataset.name / "registered"
    (raw,) = Path(environment["nnUNet_raw"]).glob("Dataset001_*")
    with claimed(target.with_suffix(".json"), wait=True):
        words = ["atlas_predict", "-d", "1", "-np", "1", "--continue_prediction"]
        run_command([*words, "-i", str(raw / "imagesUn"), "-o", str(target)], environment)
    return target


@contextmanager
def claimed(file: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds ``file``; a process that dies gives it back."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def steps_and_minutes(trained: Path) -> tuple[int, float]:
    """Steps that were made, and the minutes they took."""
    steps, seconds = 0, 0.0
    with open(trained / "curves.csv", newline="") as file:
        for row in csv.DictReader(file):
            seconds += float(row["step_seconds"]) * (int(row["iteration"]) - steps)
            steps = int(row["iteration"])
    return steps, seconds / 60


def result(job: Job, steps: int, minutes: float, summary: dict[str, Any]) -> dict[str, Any]:
    means = summary["foreground_mean"]
    cases = {}
    for case in summary["metric_per_case"]:
        dice = [metrics["Dice"] for metrics in case["metrics"].values()]
        if any(value is not None for value in dice):
            cases[case["case"]] = float(np.nanmean([np.nan if value is None else value for value in dice]))
    return {
        "command": job.train_words(),
        "row": job.row,
        "dataset": job.dataset.name,
        "seed": job.seed,
        **{measure: means[measure] for measure in MEASURES},
        "failures": means["failures"],
        "steps": steps,
        "train_minutes": minutes,
        "dice_per_case": cases,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} core(s)",
        "nnssl": nnssl.__version__,
    }


def table(jobs: Sequence[Job], folder: Path, baseline: str, ceiling: str | None = None) -> str:
    """Markdown tables by heading: means over seeds, and Dice against the row ``baseline``.

    Differences are paired over the cases after the mean over seeds; the interval is a bootstrap's (10,000 samples, bias
    corrected and accelerated). Gap closed: difference as a share of that of the row ``ceiling``.
    """
    parts = []
    for heading in dict.fromkeys(job.heading for job in jobs):
        rows: dict[str, list[dict[str, Any]]] = {}
        for job in jobs:
            file = folder / "results" / f"{job.key}.json"
            if job.heading == heading and file.is_file():
                rows.setdefault(job.row, []).append(json.loads(file.read_text()))
        if rows:
            timed = any(job.minutes for job in jobs if job.heading == heading)
            parts.append(f"### {heading}\n\n" + _table_of(rows, baseline, ceiling, steps=timed))
    return "\n\n".join(parts)


def _table_of(rows: dict[str, list[dict[str, Any]]], baseline: str, ceiling: str | None, *, steps: bool = False) -> str:
    head = ["row", "Dice by seed", *MEASURES, "failures", *(["steps"] if steps else []), "minutes"]
    head.append(f"Dice minus {baseline} [95 %]")
    lines = [[*head, "gap closed"] if ceiling in rows else head]
    for row, results in rows.items():
        cells = [row, ", ".join(f"{result['seed']}: {result['Dice']:.4f}" for result in results)]
        cells += [f"{np.mean([result[measure] for result in results]):.4f}" for measure in MEASURES]
        cells.append(f"{np.mean([result['failures'] for result in results]):.1f}")
        if steps:
            cells.append(f"{np.mean([result['steps'] for result in results]):.0f}")
        cells.append(f"{np.mean([result['train_minutes'] for result in results]):.1f}")
        difference = _difference(results, rows[baseline]) if baseline in rows and row != baseline else None
        cells.append("" if difference is None else _interval(difference))
        if ceiling in rows:
            gap = _difference(rows[ceiling], rows.get(baseline, []))
            cells.append("" if difference is None or gap is None else f"{difference.mean() / gap.mean():.2f}")
        lines.append(cells)
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _difference(results: list[dict[str, Any]], others: list[dict[str, Any]]) -> np.ndarray | None:
    """Dice of each case, mean over the seeds of both, minus that of ``others``; None if the cases differ."""
    means = []
    seeds = {result["seed"] for result in results} & {result["seed"] for result in others}
    for group in (results, others):
        cases = [result["dice_per_case"] for result in group if result["seed"] in seeds]
        if not cases or any(case.keys() != results[0]["dice_per_case"].keys() for case in cases):
            return None
        means.append(np.array([np.mean([case[name] for case in cases]) for name in sorted(cases[0])]))
    return means[0] - means[1]


def _interval(difference: np.ndarray) -> str:
    interval = bootstrap_interval(difference)
    return f"{difference.mean():+.4f}" + ("" if interval is None else f" [{interval[0]:+.4f}, {interval[1]:+.4f}]")
