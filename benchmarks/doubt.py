"""What pseudo-labels are worth that say how sure they are (docs/few_labels.md).

"Rounds 2:1 of one training, pseudo-labels not mirrored" of `rounds.py`, whose last round learns from hard labels, from
hard labels whose doubtful voxels weigh less, and from soft labels; on validation cases from the training pools of
`recipe.py`. The trainer is of another package (`candidates/`), since none of it is part of nnssl.
"""

from __future__ import annotations

import os
from pathlib import Path

from jobs import Job, main
from methods import SWITCH
from recipe import POOLS
from rounds import CANDIDATES, EPOCHS, STEPS_PER_EPOCH
from short_budgets import BRIEF

LATE = "rounds 2:1 of one training, pseudo-labels not mirrored"
USES = {"doubtful voxels weigh less": "weights", "soft pseudo-labels": "soft"}

if __name__ == "__main__":
    folder = str(Path(__file__).with_name("candidates"))
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
    jobs = []
    for seed in (0, 1):
        for pool in POOLS:
            budget, table = (EPOCHS[pool.name], STEPS_PER_EPOCH), f"{pool.name}, doubt"
            settings = (BRIEF, *CANDIDATES[LATE])
            switch = ("--atlas-augmentation", "regional_switch")
            jobs.append(Job(SWITCH, pool, "Supervised", seed, *budget, (BRIEF,), switch, table))
            jobs.append(Job(LATE, pool, "SwitchedSelfTraining", seed, *budget, settings, table=table))
            for row, use in USES.items():
                overrides = (*settings, f"use={use}")
                jobs.append(Job(f"{LATE}, {row}", pool, "DoubtfulSelfTraining", seed, *budget, overrides, table=table))
    main(jobs, __doc__, baseline=LATE)
