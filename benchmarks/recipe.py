"""Optimizers and schedules for short trainings with few labels (docs/performance.md, "Short budgets").

Candidates are compared on validation cases from the training pools; test cases take part in no choice.
"""

from __future__ import annotations

from jobs import DataSet, Job, main

POOLS = (
    DataSet("hippocampus_4_cv", "hippocampus", labeled=4, validation=30),
    DataSet(
        "acdc_4_cv",
        "acdc_crop",
        labeled=4,
        validation=20,
        source_flags=("--channel-names", "MRI", "--group-regex", r"(patient\d+)_"),
    ),
)
NNUNET = ("num_val_iterations_per_epoch=1",)
ADAMW = (*NNUNET, "optimizer_name=AdamW", "initial_lr=2e-3", "weight_decay=0.01")
CANDIDATES = {
    "AdamW 2e-3": ADAMW,
    "SGD (nnU-Net)": NNUNET,
    "SGD (nnU-Net), 3 times the steps": NNUNET,
    "AdamW 1e-3": (*ADAMW, "initial_lr=1e-3"),
    "AdamW 4e-3": (*ADAMW, "initial_lr=4e-3"),
    "AdamW 2e-3, weight decay 0.05": (*ADAMW, "weight_decay=0.05"),
    "AdamW 2e-3, weight decay 3e-5": (*ADAMW, "weight_decay=3e-5"),
    "AdamW 2e-3, foreground 67 %": (*ADAMW, "oversample_foreground_percent=0.67"),
    "AdamW 2e-3, no deep supervision": (*ADAMW, "enable_deep_supervision=False"),
}
STEPS_PER_EPOCH = 40

if __name__ == "__main__":
    main(
        [
            Job(row, pool, "Supervised", seed, 30 if "3 times" in row else 10, STEPS_PER_EPOCH, overrides)
            for row, overrides in CANDIDATES.items()
            for seed in (0, 1)
            for pool in POOLS
        ],
        __doc__,
        baseline="AdamW 2e-3",
    )
