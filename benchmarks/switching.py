"""Size and share of the regions that labeled cases exchange (docs/few_labels.md).

`Supervised` with the regional switch, and with other boxes than its defaults, on validation cases from the training
pools of `recipe.py`; test cases take part in no choice. The budget is one at which the supervised baseline is nearly
converged: before, whatever makes training harder looks bad.
"""

from __future__ import annotations

from jobs import Job, main
from recipe import POOLS
from short_budgets import BRIEF

STEPS_PER_EPOCH = 40
EPOCHS = {"hippocampus_4_cv": 30, "acdc_4_cv": 20}
NONE = "no switch"
# row: smallest and largest number of boxes, their edges, share of pairs that are switched
CANDIDATES = {
    "1 to 3 boxes of 1/4 to 1/2, half of the pairs": ("(1,3)", "(0.25,0.5)", 0.5),
    "1 to 3 boxes of 0.4 to 0.8, all pairs": ("(1,3)", "(0.4,0.8)", 1.0),
    "1 to 3 boxes of 0.4 to 0.8, half of the pairs": ("(1,3)", "(0.4,0.8)", 0.5),
    "1 to 3 boxes of 1/4 to 1/2, all pairs": ("(1,3)", "(0.25,0.5)", 1.0),
}
ROWS = {NONE: ((BRIEF,), ())} | {
    row: (
        (BRIEF, f"switch_boxes={boxes}", f"switch_edges={edges}", f"switch_probability={share}"),
        ("--atlas-augmentation", "regional_switch"),
    )
    for row, (boxes, edges, share) in CANDIDATES.items()
}

if __name__ == "__main__":
    main(
        [
            Job(f"switch, {row}", pool, "Supervised", seed, EPOCHS[pool.name], STEPS_PER_EPOCH, overrides, flags)
            for seed in (0, 1)
            for pool in POOLS
            for row, (overrides, flags) in ROWS.items()
        ],
        __doc__,
        baseline=f"switch, {NONE}",
    )
