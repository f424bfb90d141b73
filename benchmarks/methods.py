"""Every trainer of the registry under one budget on hippocampus with 4 labeled cases (docs/benchmarks.md).

All have the same cases, plan, number of steps and seeds; whatever a method does before its main phase is part of the
steps. `Supervised` with all labels of the development cases is the ceiling.
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

if __name__ == "__main__":
    names = ["Supervised", *(name for name in trainer_names() if name != "Supervised")]
    rows = [(name, FEW, name) for name in names] + [(CEILING, ALL, "Supervised")]
    jobs = [
        Job(row, dataset, trainer, seed, EPOCHS, STEPS_PER_EPOCH, RECIPE, table="hippocampus, 4 labeled cases")
        for seed in SEEDS
        for row, dataset, trainer in rows
    ]
    main(jobs, __doc__, baseline="Supervised", ceiling=CEILING)
