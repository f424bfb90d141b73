"""What the parts of `SwitchedSelfTraining` are worth, one change at a time (docs/few_labels.md).

On validation cases from the training pools of `recipe.py`; test cases take part in no choice. All rows have the same
number of steps, those of all rounds together. Registered labels are made by the first row of a pool that begins with
them. With two labeled cases there are two draws of them, with a seed of training each, and fewer rows.
"""

from __future__ import annotations

from collections.abc import Iterable

from jobs import DataSet, Job, main
from methods import SWITCH
from recipe import ATRIUM, POOLS
from short_budgets import ACDC, BRIEF

STEPS_PER_EPOCH = 40
EPOCHS = {"hippocampus_4_cv": 30, "acdc_4_cv": 20, "acdc_8_cv": 20, "la_4_cv": 10}
# frames of four patients; the four frames of acdc_4_cv are of two
PATIENTS = DataSet("acdc_8_cv", "acdc_crop", labeled=8, validation=20, source_flags=ACDC)
IN_BOX = "atlas_correspondence=bbox"
TWO = {
    # source: labeled cases of the pool to score on, epochs
    "hippocampus": (30, 20),
    "oasis35_2mm": (5, 10),
}
EQUAL = "round_shares=(1,1)"
REGISTERED = "initial_pseudo_labels=registration"
# one training whose pseudo-labels, made by an average of its networks, are renewed twice
ONE = ("rounds=3", "round_shares=(1,1,1)", "warm_start=True", "one_schedule=True", "ema_decay=0.99")
# the same, whose pseudo-labels are made once, when two thirds of it are done
LATE = ("rounds=2", "round_shares=(2,1)", *ONE[2:])
CANDIDATES: dict[str, tuple[str, ...]] = {
    "rounds 1:2": (),
    "rounds 1:1": (EQUAL,),
    "rounds 1:1, warm start": (EQUAL, "warm_start=True"),
    "rounds 1:1:1": ("rounds=3", "round_shares=(1,1,1)"),
    "rounds 1:1:1 of one training": ONE,
    "rounds 1:1:1 of one training, all pairs switched": (*ONE, "switch_probability=1"),
    "rounds 1:1:1 of one training, no pair switched": (*ONE, "switch_probability=0"),
    "rounds 1:1, all pairs switched": (EQUAL, "switch_probability=1"),
    "rounds 1:1, better half": (EQUAL, "used_shares=(0.5,)"),
    "rounds 1:1:1, better half, then all": ("rounds=3", "round_shares=(1,1,1)", "used_shares=(0.5,1)"),
    "rounds 1:1:1 of one training, better half, then all": (*ONE, "used_shares=(0.5,1)"),
    "rounds 1:1:1 of one training, better half, then all, pseudo-labels not mirrored": (
        *ONE,
        "used_shares=(0.5,1)",
        "mirrored_pseudo_labels=False",
    ),
    "rounds 2:1 of one training, pseudo-labels not mirrored": (*LATE, "mirrored_pseudo_labels=False"),
    "rounds 2:1 of one training, pseudo-labels not mirrored, no average": (*LATE[:-1], "mirrored_pseudo_labels=False"),
    "rounds 2:1 of one training, better half, pseudo-labels not mirrored, no average": (
        *LATE[:-1],
        "used_shares=(0.5,)",
        "mirrored_pseudo_labels=False",
    ),
    "rounds 1:1, corresponding in the foreground box": (EQUAL, IN_BOX),
    "registered labels, one round": (REGISTERED, "rounds=1"),
    "registered labels, one round, all pairs switched": (REGISTERED, "rounds=1", "switch_probability=1"),
    "registered labels, rounds 1:1": (REGISTERED, EQUAL),
    "registered labels, rounds 1:1, warm start": (REGISTERED, EQUAL, "warm_start=True"),
    "registered labels, rounds 1:1:1, warm start": (REGISTERED, "rounds=3", "round_shares=(1,1,1)", "warm_start=True"),
    "registered labels, one round, no pair switched": (REGISTERED, "rounds=1", "switch_probability=0"),
    "registered labels, rounds 1:1:1 of one training": (REGISTERED, *ONE),
    "registered labels, rounds 1:1:1 of one training, no pair switched": (REGISTERED, *ONE, "switch_probability=0"),
}
WITH_TWO = [row for row in CANDIDATES if row.startswith("registered labels, one round")]
WITH_TWO.append("registered labels, rounds 1:1:1 of one training")


def rows(pool: DataSet, seed: int, epochs: int, table: str, candidates: Iterable[str]) -> list[Job]:
    """The baseline, its control in two kinds of coordinates, and `SwitchedSelfTraining` with the named settings."""
    budget, switch = (epochs, STEPS_PER_EPOCH), ("--atlas-augmentation", "regional_switch")
    return [
        Job("Supervised", pool, "Supervised", seed, *budget, (BRIEF,), table=table),
        Job(SWITCH, pool, "Supervised", seed, *budget, (BRIEF,), switch, table),
        Job(f"{SWITCH}, foreground box", pool, "Supervised", seed, *budget, (BRIEF, IN_BOX), switch, table),
        *(
            Job(row, pool, "SwitchedSelfTraining", seed, *budget, (BRIEF, *CANDIDATES[row]), table=table)
            for row in candidates
        ),
    ]


def jobs() -> list[Job]:
    """Seed by seed, pool by pool."""
    found = []
    for seed in (0, 1):
        for pool in (*POOLS, PATIENTS, ATRIUM):
            found += rows(pool, seed, EPOCHS[pool.name], f"{pool.name}, rounds", CANDIDATES)
        for source, (validation, epochs) in TWO.items():
            name = f"{source}_2_draw_{seed}_cv"
            pool = DataSet(name, source, labeled=2, draw=seed, validation=validation)
            found += rows(pool, seed, epochs, f"{source}, 2 labeled cases, rounds", WITH_TWO)
    return found


if __name__ == "__main__":
    main(jobs(), __doc__, baseline="Supervised")
