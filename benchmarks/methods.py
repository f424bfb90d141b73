"""Every trainer of the registry under one budget on hippocampus with 4 labeled cases (docs/benchmarks.md).

All have the same cases, plan, number of steps and seeds; whatever a method does before its main phase is part of the
steps. `Supervised` with all labels of the development cases is the ceiling. Methods with several phases, which the
short budget leaves unfinished, are trained three times as long as well.
"""

from __future__ import annotations

from jobs import DataSet, Job, main

from nnssl.trainers.registry import trainer_names

FEW = DataSet("hippocampus_4", "hippocampus", labeled=4)
ALL = DataSet("hippocampus_160", "hippocampus", labeled=160)
SEEDS = (0, 1)
EPOCHS, STEPS_PER_EPOCH = 10, 40
RECIPE = ("num_val_iterations_per_epoch=1", "optimizer_name=AdamW", "initial_lr=2e-3", "weight_decay=0.01")
CEILING = "Supervised, all labels"
SWITCH = "Supervised, regional switch"
# rows beside the trainers themselves: trainer, hyper-parameters, flags
VARIANTS = {
    CEILING: ("Supervised", (), ()),
    SWITCH: ("Supervised", (), ("--atlas-augmentation", "regional_switch")),
    "UAMT, no dropout": ("UAMT", ("dropout_rate=0", "teacher_passes=2"), ()),
}
LONGER = ("Supervised", SWITCH, "SwitchedSelfTraining", "SelfTraining", "BCP", "ReciprocalLearning", "M3HL")
FEW_LONGER = DataSet("hippocampus_4_longer", "hippocampus", labeled=4)


def job(row: str, dataset: DataSet, seed: int, epochs: int) -> Job:
    """A training of a trainer, or one of the other rows."""
    trainer, overrides, flags = VARIANTS.get(row, (row, (), ()))
    table = f"hippocampus, 4 labeled cases, {epochs * STEPS_PER_EPOCH:,} steps"
    return Job(row, dataset, trainer, seed, epochs, STEPS_PER_EPOCH, (*RECIPE, *overrides), flags, table)


if __name__ == "__main__":
    names = ["Supervised", *(name for name in trainer_names() if name != "Supervised")]
    rows = [(name, FEW) for name in (*names, SWITCH, "UAMT, no dropout")] + [(CEILING, ALL)]
    jobs = [job(row, dataset, seed, EPOCHS) for seed in SEEDS for row, dataset in rows]
    jobs += [job(row, FEW_LONGER, 0, 3 * EPOCHS) for row in LONGER]
    main(jobs, __doc__, baseline="Supervised", ceiling=CEILING)
