"""Methods in 2D: fetal heads in ultrasound with eight labeled images (docs/benchmarks.md)."""

from __future__ import annotations

from jobs import DataSet, Job, main
from methods import CEILING, RECIPE

FLAGS = ("--channel-names", "US", "--group-regex", r"((?:test_)?\d+)_")
FEW = DataSet("hc18_8", "hc18", labeled=8, source_flags=FLAGS, configuration="2d")
ALL = DataSet("hc18_243", "hc18", labeled=243, source_flags=FLAGS, configuration="2d")
NAMES = ("Supervised", "MeanTeacher", "BCP", "M3HL", "CAD", "C3S3")
EPOCHS, STEPS_PER_EPOCH = 5, 40


def job(row: str, dataset: DataSet, seed: int) -> Job:
    trainer = "Supervised" if row == CEILING else row
    table = f"hc18 in 2D, 8 labeled images, {EPOCHS * STEPS_PER_EPOCH} steps"
    return Job(row, dataset, trainer, seed, EPOCHS, STEPS_PER_EPOCH, RECIPE, (), table)


if __name__ == "__main__":
    rows = [(name, FEW) for name in NAMES] + [(CEILING, ALL)]
    main(
        [job(row, dataset, seed) for seed in (0, 1) for row, dataset in rows],
        __doc__,
        baseline="Supervised",
        ceiling=CEILING,
    )
