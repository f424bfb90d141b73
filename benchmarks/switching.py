"""Size, number and share of the regions that labeled cases exchange, and where from (docs/few_labels.md).

`Supervised` with the regional switch as it is, and with one thing changed, on validation cases from the training pools
of `recipe.py`; test cases take part in no choice. Positions correspond as the plan of the test tables has them: by
relative coordinates on ACDC, by the foreground box on hippocampus. The baseline of each set is a row of `rounds.py`.
"""

from __future__ import annotations

from dataclasses import replace

from jobs import DataSet, Job, main
from methods import SWITCH
from recipe import POOLS
from rounds import EPOCHS, IN_BOX, STEPS_PER_EPOCH
from short_budgets import BRIEF

FLAGS = ("--atlas-augmentation", "regional_switch")
CANDIDATES = {
    "boxes of 0.4 to 0.8": ("switch_edges=(0.4,0.8)",),
    "all pairs": ("switch_probability=1",),
    "3 to 6 boxes of 0.12 to 0.25": ("switch_boxes=(3,6)", "switch_edges=(0.12,0.25)"),
    "one box of 0.5 to 0.75": ("switch_boxes=(1,1)", "switch_edges=(0.5,0.75)"),
}


def rows(pool: DataSet, seed: int) -> list[Job]:
    """The switch as it is, then each candidate, then positions that correspond by registration."""
    common = (BRIEF, IN_BOX) if pool.name.startswith("hippocampus") else (BRIEF,)
    name = f"{SWITCH}, foreground box" if IN_BOX in common else SWITCH
    changes = {name: common} | {f"{name}, {row}": (*common, *overrides) for row, overrides in CANDIDATES.items()}
    budget, table = (EPOCHS[pool.name], STEPS_PER_EPOCH), f"{pool.name}, boxes"
    found = [Job(row, pool, "Supervised", seed, *budget, overrides, FLAGS, table) for row, overrides in changes.items()]
    aligned = replace(pool, name=f"{pool.name}_aligned", plan_flags=("--align-atlases", "affine"))
    overrides = (BRIEF, "atlas_correspondence=registration")
    return [*found, Job(f"{SWITCH}, aligned", aligned, "Supervised", seed, *budget, overrides, FLAGS, table)]


if __name__ == "__main__":
    main([job for seed in (0, 1) for pool in POOLS for job in rows(pool, seed)], __doc__, baseline=SWITCH)
