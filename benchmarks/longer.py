"""What late pseudo-labels are worth beside the regional switch in longer trainings (docs/few_labels.md).

The same steps for both rows of a set, test cases: twice as many and more as the minutes of `recommended.py` buy, which
is what a user with an hour has. A draw of the labels has a seed of its own for the training, too.
"""

from __future__ import annotations

from jobs import DataSet, Job, main
from methods import SWITCH
from recommended import LATE_FLAGS, LATE_ROW, ROWS, SETS
from short_budgets import BRIEF

STEPS_PER_EPOCH = 40
# source: epochs, draws
LENGTHS = {"acdc_crop": (60, (0, 1)), "la_1p25mm": (30, (0,))}


def jobs() -> list[Job]:
    """Set by set, draw by draw."""
    found = []
    rows = {SWITCH: ROWS[SWITCH], LATE_ROW: ("SwitchedSelfTraining", LATE_FLAGS)}
    for source, (epochs, draws) in LENGTHS.items():
        (labeled, _), _, flags = SETS[source]
        table = f"{source}, {labeled} labeled cases, {epochs * STEPS_PER_EPOCH:,} steps"
        for draw in draws:
            few = DataSet(f"{source}_{labeled}_draw_{draw}_longer", source, labeled, draw, **flags)
            for row, (trainer, words) in rows.items():
                budget = (epochs, STEPS_PER_EPOCH, (BRIEF,))
                found.append(Job(row, few, trainer, draw, *budget, flags=tuple(words), table=table))
    return found


if __name__ == "__main__":
    main(jobs(), __doc__, baseline=SWITCH)
