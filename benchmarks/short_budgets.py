"""The recipe of short trainings against nnU-Net's, and against stock nnU-Net, on test cases (docs/few_labels.md).

`Supervised` with each recipe on four sets, with few labeled cases and with all, and on hippocampus nnU-Net's own
trainer on the same plan, also in about the same minutes.
"""

from __future__ import annotations

from jobs import DataSet, Job, main

ACDC = ("--channel-names", "MRI", "--group-regex", r"(patient\d+)_")
BRIEF = "num_val_iterations_per_epoch=1"
STEPS_PER_EPOCH = 40
# source: labeled cases, few and all; epochs; flags of nnssl_split
SETS: dict[str, tuple[tuple[int, int], int, dict[str, tuple[str, ...]]]] = {
    "hippocampus": ((4, 160), 10, {}),
    "la_1p25mm": ((4, 70), 4, {}),
    "acdc_crop": ((4, 100), 4, {"source_flags": ACDC}),
    "oasis35_2mm": ((4, 15), 6, {}),
}
SHORT, NNUNET, LONG = "short recipe", "nnU-Net's recipe", "nnU-Net's recipe, 3 times the steps"
STOCK = "stock nnU-Net, 3 times the steps"
# about as many as stock nnU-Net makes in the minutes of STOCK on a CPU with bf16: its step takes 2.1 times as long
TIMED = "short recipe, 6 times the steps"
# for the set on which the short recipe does not reach nnU-Net's in a third of the steps
EQUAL = "short recipe, 3 times the steps"
ROWS = {
    SHORT: ("Supervised", (BRIEF, "recipe=short"), 1),
    NNUNET: ("Supervised", (BRIEF, "recipe=nnunet"), 1),
    LONG: ("Supervised", (BRIEF, "recipe=nnunet"), 3),
    STOCK: ("nnUNetTrainer", (), 3),
    TIMED: ("Supervised", (BRIEF, "recipe=short"), 6),
    EQUAL: ("Supervised", (BRIEF, "recipe=short"), 3),
}
ONLY_ON = {STOCK: "hippocampus", TIMED: "hippocampus", EQUAL: "la_1p25mm"}


def jobs() -> list[Job]:
    """Seed by seed, few labels first."""
    return [
        Job(row, dataset, trainer, seed, epochs * times, STEPS_PER_EPOCH, overrides)
        for seed in (0, 1)
        for share in (0, 1)
        for source, (labeled, epochs, flags) in SETS.items()
        for dataset in [DataSet(f"{source}_{labeled[share]}", source, labeled[share], **flags)]
        for row, (trainer, overrides, times) in ROWS.items()
        if row not in ONLY_ON or (source == ONLY_ON[row] and share == 0)
    ]


if __name__ == "__main__":
    main(jobs(), __doc__, baseline=LONG)
