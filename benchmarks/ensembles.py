"""One training, or an ensemble of two of half its length (docs/few_labels.md).

    python benchmarks/ensembles.py -o RUNS --data DATA --core 0     # trainings
    python benchmarks/ensembles.py -o RUNS --members                # ensembles of what is there, and their table

The regional switch on validation cases from the training pools of `recipe.py`, with the correspondence of
`switching.py`. The trainings of the whole length are rows of `rounds.py`. An ensemble is what nnssl_predict makes of
several folds: the mean of their probabilities.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jobs import Job, main
from recipe import POOLS
from switching import rows

from nnssl.benchmark.steps import run_command
from nnssl.evaluation.statistics import bootstrap_interval

WHOLE, HALF = "all steps", "half the steps"
ENSEMBLES = {WHOLE: [(0, 1)], HALF: [(0, 1), (2, 3)]}


def jobs(pool_index: int, length: str) -> list[Job]:
    """The trainings of one length on one pool, by seed."""
    seeds = sorted(seed for members in ENSEMBLES[length] for seed in members)
    found = [rows(POOLS[pool_index], seed)[0] for seed in seeds]
    if length == HALF:
        found = [replace(job, row=f"{job.row}, {HALF}", epochs=job.epochs // 2) for job in found]
    return [replace(job, table=f"{job.dataset.name}, ensembles") for job in found]


def scores(members: Sequence[Job], folder: Path) -> dict[str, float]:
    """Dice by validation case of an ensemble, mean over the classes; made if it is not there."""
    pool, seeds = members[0].dataset.name, "+".join(str(job.seed) for job in members)
    (raw,) = (folder / "data" / pool / "raw").glob("Dataset001_*")
    home = folder / "runs" / pool / members[0].row.replace(" ", "_") / f"ensemble_{seeds}"
    summary = home / "predicted" / "summary.json"
    if not summary.is_file():
        model, images = home / "model", home / "images"
        model.mkdir(parents=True, exist_ok=True)
        images.mkdir(exist_ok=True)
        trained = [next((folder / "runs" / job.key).glob("*/*/fold_0")) for job in members]
        for number, fold in enumerate(trained):
            _link(model / f"fold_{number}", fold)
        for name in ("plans.json", "dataset.json"):
            _link(model / name, trained[0].parent / name)
        for mask in trained[0].joinpath("validation").glob("*.nii.gz"):
            for image in raw.joinpath("imagesTr").glob(f"{mask.name.removesuffix('.nii.gz')}_*.nii.gz"):
                _link(images / image.name, image.resolve())
        folds = [str(number) for number in range(len(members))]
        words = ["predict", "-m", str(model), "-f", *folds, "-i", str(images), "-o", str(home / "predicted")]
        run_command([*words, "-device", "cpu", "--continue_prediction", "--disable_progress_bar"], {})
        cases = sorted(mask.name.removesuffix(".nii.gz") for mask in (home / "predicted").glob("*.nii.gz"))
        words = ["evaluate", "-gt", str(raw / "labelsTr"), "-pred", str(home / "predicted"), "-o", str(summary)]
        run_command([*words, "--cases", *cases], {})
    found = {}
    for case in json.loads(summary.read_text())["metric_per_case"]:
        values = [metrics["Dice"] for metrics in case["metrics"].values()]
        found[Path(case["case"]).name] = float(np.nanmean([np.nan if value is None else value for value in values]))
    return found


def _link(link: Path, target: Path) -> None:
    if not link.exists():
        link.symlink_to(target)


def table(folder: Path) -> str:
    """Dice of single trainings and of ensembles; differences against single trainings of all steps."""
    lines = []
    for number, pool in enumerate(POOLS):
        reference = None
        for length, ensembles in ENSEMBLES.items():
            of_seed = {job.seed: job for job in jobs(number, length)}
            groups = {f"one training, {length}": [(seed,) for seed in of_seed], f"two trainings, {length}": ensembles}
            for row, chosen in groups.items():
                parts = [scores([of_seed[seed] for seed in members], folder) for members in chosen]
                means = np.array([np.mean([part[case] for part in parts]) for case in sorted(parts[0])])
                reference = means if reference is None else reference
                difference = means - reference
                interval = bootstrap_interval(difference) if difference.any() else None
                shown = "" if interval is None else f"{difference.mean():+.4f} [{interval[0]:+.4f}, {interval[1]:+.4f}]"
                by_part = ", ".join(f"{np.mean(list(part.values())):.4f}" for part in parts)
                lines.append(f"| {pool.name} | {row} | {by_part} | {means.mean():.4f} | {shown} |")
    head = "| pool | row | Dice of each | mean | minus one training, all steps [95 %] |"
    return "\n".join([head, "|" + " --- |" * 5, *lines])


if __name__ == "__main__":
    if "--members" in sys.argv:
        print(table(Path(sys.argv[sys.argv.index("-o") + 1]).absolute()))
    else:
        queue = [job for length in ENSEMBLES for number in range(len(POOLS)) for job in jobs(number, length)]
        main(sorted(queue, key=lambda job: job.seed), __doc__, baseline=queue[0].row)
