"""Optimizers and learning rates for short trainings with few labels, and mirroring (docs/few_labels.md).

Candidates are compared on validation cases from the training pools, one change at a time; test cases take part in no
choice.
"""

from __future__ import annotations

from jobs import DataSet, Job, main
from short_budgets import ACDC, BRIEF

POOLS = (
    DataSet("hippocampus_4_cv", "hippocampus", labeled=4, validation=30),
    DataSet(
        "acdc_4_cv",
        "acdc_crop",
        labeled=4,
        validation=20,
        source_flags=ACDC,
    ),
)
NNUNET = (BRIEF,)
ADAMW = (*NNUNET, "optimizer_name=AdamW", "initial_lr=2e-3", "weight_decay=0.01")
FAST = (*ADAMW, "initial_lr=1e-2", "warmup_steps=20")
# what the short recipe is with several classes
SEVERAL = (*FAST, "segmentation_dice_weight=16", "rare_class_power=0.5")
STEPS_PER_EPOCH, EPOCHS = 40, 10

# nnU-Net's, whatever the number of steps
SGD = (*NNUNET, "recipe=nnunet")

# row: trainer, hyper-parameters, times the steps
CANDIDATES = {
    "AdamW 2e-3": ("Supervised", ADAMW, 1),
    "SGD (nnU-Net)": ("Supervised", SGD, 1),
    "SGD (nnU-Net), 3 times the steps": ("Supervised", SGD, 3),
    "SGD, momentum 0.9": ("Supervised", (*SGD, "momentum=0.9"), 1),
    "AdamW 1e-3": ("Supervised", (*ADAMW, "initial_lr=1e-3"), 1),
    "AdamW 4e-3": ("Supervised", (*ADAMW, "initial_lr=4e-3"), 1),
    "AdamW 4e-3, 40 steps of warm-up": ("Supervised", (*ADAMW, "initial_lr=4e-3", "warmup_steps=40"), 1),
    "AdamW 8e-3, 40 steps of warm-up": ("Supervised", (*ADAMW, "initial_lr=8e-3", "warmup_steps=40"), 1),
    "AdamW 2e-3, 40 steps of warm-up": ("Supervised", (*ADAMW, "warmup_steps=40"), 1),
    "AdamW 2e-3, weight decay 0.05": ("Supervised", (*ADAMW, "weight_decay=0.05"), 1),
    "AdamW 2e-3, weight decay 3e-5": ("Supervised", (*ADAMW, "weight_decay=3e-5"), 1),
    "AdamW 2e-3, decay to the power of 2": ("Supervised", (*ADAMW, "lr_decay_power=2"), 1),
    "AdamW 2e-3, decay to the power of 0.5": ("Supervised", (*ADAMW, "lr_decay_power=0.5"), 1),
    "AdamW 2e-3, decay in every step": ("Supervised", (*ADAMW, "lr_decay_per_step=True"), 1),
    # of two patches, 33 and 67 % are one
    "AdamW 2e-3, all patches on foreground": ("Supervised", (*ADAMW, "oversample_foreground_percent=1"), 1),
    "AdamW 2e-3, no patch on foreground": ("Supervised", (*ADAMW, "oversample_foreground_percent=0"), 1),
    "AdamW 2e-3, no deep supervision": ("Supervised", (*ADAMW, "enable_deep_supervision=False"), 1),
    "AdamW 2e-3, mirrored along all axes": ("Supervised", (*ADAMW, "mirror_axes=(0,1,2)"), 1),
    "AdamW 2e-3, not mirrored": ("Supervised", (*ADAMW, "mirror_axes=()"), 1),
    "AdamW 2e-3, not rotated": ("Supervised", (*ADAMW, "rotation_degrees=0"), 1),
    "the recipe of several classes": ("Supervised", SEVERAL, 1),
    # the same when the baseline is nearly converged
    "AdamW 2e-3, 3 times the steps": ("Supervised", ADAMW, 3),
    "the recipe of several classes, 3 times the steps": ("Supervised", SEVERAL, 3),
    "AdamW 5e-3, Dice weighs 16, rare classes weigh more, 3 times the steps": (
        "Supervised",
        (*SEVERAL, "initial_lr=5e-3"),
        3,
    ),
    "AdamW 2e-3, Dice weighs 16, rare classes weigh more, 3 times the steps": (
        "Supervised",
        (*SEVERAL, "initial_lr=2e-3"),
        3,
    ),
    "AdamW 2e-3, Dice weighs 4, 3 times the steps": ("Supervised", (*ADAMW, "segmentation_dice_weight=4"), 3),
    # what each part of it adds
    "AdamW 1e-2, 20 steps of warm-up": ("Supervised", FAST, 1),
    "AdamW 1e-2, Dice weighs 4": ("Supervised", (*FAST, "segmentation_dice_weight=4"), 1),
    "AdamW 1e-2, Dice weighs 16": ("Supervised", (*FAST, "segmentation_dice_weight=16"), 1),
    "AdamW 1e-2, rare classes weigh more": ("Supervised", (*FAST, "rare_class_power=0.5"), 1),
    "AdamW 1e-2, Dice weighs 4, rare classes weigh more": (
        "Supervised",
        (*FAST, "segmentation_dice_weight=4", "rare_class_power=0.5"),
        1,
    ),
    "AdamW 5e-3, Dice weighs 16, rare classes weigh more": ("Supervised", (*SEVERAL, "initial_lr=5e-3"), 1),
    "the recipe of several classes, decay in every step": ("Supervised", (*SEVERAL, "lr_decay_per_step=True"), 1),
}
# the other one of nnU-Net's two ranges: ACDC has slices, within which it rotates by up to 180 degrees
ROTATED = {"hippocampus_4_cv": 180, "acdc_4_cv": 30}
# one class, 160 steps
ATRIUM = DataSet("la_4_cv", "la_1p25mm", labeled=4, validation=10)
ATRIUM_EPOCHS = 4
ATRIUM_ROWS = {
    "AdamW 2e-3": ADAMW,
    "AdamW 1e-3": (*ADAMW, "initial_lr=1e-3"),
    "AdamW 2e-3, not mirrored": (*ADAMW, "mirror_axes=()"),
    "AdamW 2e-3, Dice weighs 0.25": (*ADAMW, "segmentation_dice_weight=0.25"),
    "AdamW 2e-3, all patches on foreground": (*ADAMW, "oversample_foreground_percent=1"),
    "AdamW 2e-3, no patch on foreground": (*ADAMW, "oversample_foreground_percent=0"),
    "AdamW 2e-3, no deep supervision": (*ADAMW, "enable_deep_supervision=False"),
    "AdamW 2e-3, not rotated": (*ADAMW, "rotation_degrees=0"),
    "SGD (nnU-Net)": SGD,
    "AdamW 2e-3, decay in every step": (*ADAMW, "lr_decay_per_step=True"),
    "AdamW 4e-3, 20 steps of warm-up, decay in every step": (
        *ADAMW,
        "initial_lr=4e-3",
        "warmup_steps=20",
        "lr_decay_per_step=True",
    ),
    "the recipe of several classes": SEVERAL,
    "AdamW 5e-3, Dice weighs 16, rare classes weigh more": (*SEVERAL, "initial_lr=5e-3"),
    "AdamW 2e-3, Dice weighs 16, rare classes weigh more": (*SEVERAL, "initial_lr=2e-3"),
    "AdamW 5e-3, Dice weighs 16": (*SEVERAL, "initial_lr=5e-3", "rare_class_power=0"),
    "AdamW 5e-3, rare classes weigh more": (*SEVERAL, "initial_lr=5e-3", "segmentation_dice_weight=1"),
    "AdamW 5e-3, 20 steps of warm-up": (*FAST, "initial_lr=5e-3"),
    "AdamW 5e-3, Dice weighs 4, rare classes weigh more": (*SEVERAL, "initial_lr=5e-3", "segmentation_dice_weight=4"),
}
# 16 structures, 240 steps: the recipe of several classes, what each part of it adds, and mirroring
BRAIN = DataSet("oasis_2_cv", "oasis35_2mm", labeled=2, validation=5)
BRAIN_EPOCHS = 6
PLAIN = (*ADAMW, "warmup_steps=0", "segmentation_dice_weight=1", "rare_class_power=0")
FASTER = (*PLAIN, "initial_lr=1e-2", "warmup_steps=20")
PARTS = {
    "AdamW 2e-3": PLAIN,
    "AdamW 1e-2, warm-up": FASTER,
    "AdamW 1e-2, warm-up, Dice weighs 16": (*FASTER, "segmentation_dice_weight=16"),
    "AdamW 1e-2, warm-up, rare classes weigh more": (*FASTER, "rare_class_power=0.5"),
    "the recipe of several classes": SEVERAL,
    "the same, mirrored along all axes": (*SEVERAL, "mirror_axes=(0,1,2)"),
    "the same, not mirrored": (*SEVERAL, "mirror_axes=()"),
}


def jobs() -> list[Job]:
    """Pool by pool, row by row."""
    found = []
    for pool in POOLS:
        angle = ROTATED[pool.name]
        rotated = (*ADAMW, f"rotation_degrees={angle}")
        rows = CANDIDATES | {f"AdamW 2e-3, rotated by up to {angle} degrees": ("Supervised", rotated, 1)}
        found += [
            Job(row, pool, trainer, seed, EPOCHS * times, STEPS_PER_EPOCH, overrides)
            for row, (trainer, overrides, times) in rows.items()
            for seed in (0, 1)
        ]
    found += [
        Job(row, ATRIUM, "Supervised", seed, ATRIUM_EPOCHS, STEPS_PER_EPOCH, overrides)
        for seed in (0, 1)
        for row, overrides in ATRIUM_ROWS.items()
    ]
    return found + [
        Job(row, BRAIN, "Supervised", seed, BRAIN_EPOCHS, STEPS_PER_EPOCH, overrides)
        for seed in (0, 1)
        for row, overrides in PARTS.items()
    ]


if __name__ == "__main__":
    main(jobs(), __doc__, baseline="AdamW 2e-3")
