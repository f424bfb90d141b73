"""What a method is worth in the same minutes: four sets, few labeled cases, two draws of them (docs/benchmarks.md).

Every row of a set has the same minutes on one core, from the start of the command to the end of the training,
predictions of unlabeled cases between its phases and registration included, and makes the steps that these buy. A draw
has a seed of its own for the training, too. `Supervised` with the regional switch is the control of every method that
mixes patches, and what `auto` chooses with four labeled cases; with two it has a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from jobs import DataSet, Job, main
from methods import CEILING, SWITCH
from rounds import LATE, ONE
from short_budgets import ACDC

from nnssl.trainers.choosing import MOST_REGISTERED

# rounds that are one training; pseudo-labels without mirrored copies, at first of the better half of the cases
ONE_TRAINING = (*ONE, "used_shares=(0.5,1)", "mirrored_pseudo_labels=False")


def settings(*overrides: str) -> list[str]:
    """As flags of `nnssl_train`."""
    return [word for setting in overrides for word in ("--set", setting)]


# row: trainer, flags
ROWS: dict[str, tuple[str, Sequence[str]]] = {
    "Supervised": ("Supervised", ()),
    SWITCH: ("Supervised", ("--atlas-augmentation", "regional_switch")),
    "SelfTraining": ("SelfTraining", ()),
    "BCP": ("BCP", ()),
    "SwitchedSelfTraining": ("SwitchedSelfTraining", ()),
    "SwitchedSelfTraining, one training": ("SwitchedSelfTraining", settings(*ONE_TRAINING)),
}
# pseudo-labels that are made once, after two thirds of one training; with one class they lost on validation cases, and
# on the brain earlier ones lost 0.08 and more
LATE_ROW = "SwitchedSelfTraining, late pseudo-labels"
LATE_FLAGS = settings(*LATE, "mirrored_pseudo_labels=False")
LATE_SETS = ("hippocampus", "acdc_crop")
# source: labeled cases, few and all; minutes; flags of nnssl_split
SETS: dict[str, tuple[tuple[int, int], float, dict[str, tuple[str, ...]]]] = {
    "hippocampus": ((4, 160), 5, {}),
    "acdc_crop": ((4, 100), 6, {"source_flags": ACDC}),
    "la_1p25mm": ((4, 70), 8, {}),
    "oasis35_2mm": ((2, 15), 9, {}),
}


def jobs() -> list[Job]:
    """Draw by draw, set by set."""
    found = []
    for draw in (0, 1):
        for source, ((labeled, cases), minutes, flags) in SETS.items():
            table = f"{source}, {labeled} labeled cases, {minutes:g} minutes, draws 0 and 1"
            few = DataSet(f"{source}_{labeled}_draw_{draw}_timed", source, labeled, draw, **flags)
            every = DataSet(f"{source}_{cases}_timed", source, cases, **flags)
            for row, (trainer, words) in ROWS.items():
                found.append(Job(row, few, trainer, draw, flags=tuple(words), table=table, minutes=minutes))
            if source in LATE_SETS:
                trainer = "SwitchedSelfTraining"
                found.append(Job(LATE_ROW, few, trainer, draw, flags=tuple(LATE_FLAGS), table=table, minutes=minutes))
            if labeled <= MOST_REGISTERED:
                found.append(Job("auto", few, "auto", draw, table=table, minutes=minutes))
            found.append(Job(CEILING, every, "Supervised", draw, table=table, minutes=minutes))
    return found


if __name__ == "__main__":
    main(jobs(), __doc__, baseline="Supervised", ceiling=CEILING)
