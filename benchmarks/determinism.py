"""Whether trainings in normal and in deterministic mode end alike: the same seeds, test cases of hippocampus.

In normal mode kernels may be chosen by timing and sums be taken in another order, so that weights differ from run to
run; the results must not differ by more than runs with other seeds do (docs/performance.md, "Exactness").
"""

from __future__ import annotations

from jobs import DataSet, Job, main

FEW = DataSet("hippocampus_4", "hippocampus", labeled=4)
RECIPE = ("num_val_iterations_per_epoch=1", "optimizer_name=AdamW", "initial_lr=2e-3", "weight_decay=0.01")
MODES: dict[str, tuple[str, ...]] = {"normal": (), "deterministic": ("--deterministic",)}

if __name__ == "__main__":
    main(
        [
            Job(mode, FEW, "Supervised", seed, 5, 40, RECIPE, flags)
            for seed in range(4)
            for mode, flags in MODES.items()
        ],
        __doc__,
        baseline="normal",
    )
