"""What the parts of `SwitchedSelfTraining` are worth, one change at a time (docs/few_labels.md).

On validation cases from the training pools of `recipe.py`; test cases take part in no choice. All rows have the same
number of steps, those of all rounds together. Registered labels are made by the
first row of a pool that begins with them.
"""

from __future__ import annotations

from jobs import Job, main
from methods import SWITCH
from recipe import POOLS
from short_budgets import BRIEF

STEPS_PER_EPOCH = 40
EPOCHS = {"hippocampus_4_cv": 30, "acdc_4_cv": 20}
EQUAL = "round_shares=(1,1)"
REGISTERED = "initial_pseudo_labels=registration"
# one training whose pseudo-labels, made by an average of its networks, are renewed twice
ONE = ("rounds=3", "round_shares=(1,1,1)", "warm_start=True", "one_schedule=True", "ema_decay=0.99")
CANDIDATES: dict[str, tuple[str, ...]] = {
    "rounds 1:2": (),
    "rounds 1:1": (EQUAL,),
    "rounds 1:1, warm start": (EQUAL, "warm_start=True"),
    "rounds 1:1:1": ("rounds=3", "round_shares=(1,1,1)"),
    "rounds 1:1:1 of one training": ONE,
    "rounds 1:1:1 of one training, all pairs switched": (*ONE, "switch_probability=1"),
    "rounds 1:1:1 of one training, no pair switched": (*ONE, "switch_probability=0"),
    "rounds 1:1, all pairs switched": (EQUAL, "switch_probability=1"),
    "rounds 1:1, corresponding in the foreground box": (EQUAL, "atlas_correspondence=bbox"),
    "registered labels, one round": (REGISTERED, "rounds=1"),
    "registered labels, one round, all pairs switched": (REGISTERED, "rounds=1", "switch_probability=1"),
    "registered labels, rounds 1:1": (REGISTERED, EQUAL),
    "registered labels, rounds 1:1, warm start": (REGISTERED, EQUAL, "warm_start=True"),
    "registered labels, rounds 1:1:1, warm start": (REGISTERED, "rounds=3", "round_shares=(1,1,1)", "warm_start=True"),
    "registered labels, one round, no pair switched": (REGISTERED, "rounds=1", "switch_probability=0"),
    "registered labels, rounds 1:1:1 of one training": (REGISTERED, *ONE),
    "registered labels, rounds 1:1:1 of one training, no pair switched": (REGISTERED, *ONE, "switch_probability=0"),
}


def jobs() -> list[Job]:
    """Seed by seed, pool by pool."""
    found = []
    for seed in (0, 1):
        for pool in POOLS:
            table, budget = f"{pool.name}, rounds", (EPOCHS[pool.name], STEPS_PER_EPOCH)
            switch = ("--atlas-augmentation", "regional_switch")
            found.append(Job("Supervised", pool, "Supervised", seed, *budget, (BRIEF,), table=table))
            found.append(Job(SWITCH, pool, "Supervised", seed, *budget, (BRIEF,), switch, table))
            for row, overrides in CANDIDATES.items():
                found.append(Job(row, pool, "SwitchedSelfTraining", seed, *budget, (BRIEF, *overrides), table=table))
    return found


if __name__ == "__main__":
    main(jobs(), __doc__, baseline="Supervised")
