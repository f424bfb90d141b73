"""What the parts of `SwitchedSelfTraining` are worth, one change at a time (docs/few_labels.md).

On validation cases from the training pools of `recipe.py`; test cases take part in no choice. All rows have the same
number of steps, those of all rounds together. Registered labels are made once for all rows of a pool.
"""

from __future__ import annotations

from dataclasses import replace

from jobs import Job, main
from methods import SWITCH
from recipe import POOLS
from short_budgets import BRIEF

STEPS_PER_EPOCH = 40
EPOCHS = {"hippocampus_4_cv": 30, "acdc_4_cv": 20}
EQUAL = "round_shares=(1,1)"
REGISTERED = "registered labels"
# row: hyper-parameters, whether it begins with registered labels
CANDIDATES: dict[str, tuple[tuple[str, ...], bool]] = {
    "rounds 1:2": ((), False),
    "rounds 1:1": ((EQUAL,), False),
    "rounds 1:1, warm start": ((EQUAL, "warm_start=True"), False),
    "rounds 1:1:1": (("rounds=3", "round_shares=(1,1,1)"), False),
    "rounds 1:1, all pairs switched": ((EQUAL, "switch_probability=1"), False),
    "rounds 1:1, corresponding in the foreground box": ((EQUAL, "atlas_correspondence=bbox"), False),
    f"{REGISTERED}, one round": (("rounds=1",), True),
    f"{REGISTERED}, one round, all pairs switched": (("rounds=1", "switch_probability=1"), True),
    f"{REGISTERED}, rounds 1:1": ((EQUAL,), True),
    f"{REGISTERED}, rounds 1:1, warm start": ((EQUAL, "warm_start=True"), True),
    f"{REGISTERED}, rounds 1:1:1, warm start": (("rounds=3", "round_shares=(1,1,1)", "warm_start=True"), True),
}


def jobs() -> list[Job]:
    """Seed by seed, pool by pool."""
    found = []
    for seed in (0, 1):
        for pool in POOLS:
            table, budget = f"{pool.name}, rounds", (EPOCHS[pool.name], STEPS_PER_EPOCH)
            switch = ("--atlas-augmentation", "regional_switch")
            found.append(Job(SWITCH, pool, "Supervised", seed, *budget, (BRIEF,), switch, table))
            for row, (overrides, registered) in CANDIDATES.items():
                job = Job(row, pool, "SwitchedSelfTraining", seed, *budget, (BRIEF, *overrides), table=table)
                found.append(replace(job, from_registration=registered))
    return found


if __name__ == "__main__":
    main(jobs(), __doc__, baseline=SWITCH)
