"""What `auto` chooses and late pseudo-labels in the longest minutes of a job (docs/benchmarks.md).

Rows of `recommended.py` with 12 instead of 5 and 6 minutes, test cases, on the sets on which late pseudo-labels gained
in equal steps: few labels may be learned by then, and unlabeled cases what is left to gain.
"""

from __future__ import annotations

from jobs import DataSet, Job, main
from methods import CEILING, SWITCH
from recommended import LATE_FLAGS, LATE_ROW, LATE_SETS, ROWS, SETS

MINUTES = 12


def jobs() -> list[Job]:
    """Draw by draw, set by set."""
    found = []
    for draw in (0, 1):
        for source in LATE_SETS:
            (labeled, cases), _, flags = SETS[source]
            table = f"{source}, {labeled} labeled cases, {MINUTES} minutes, draws 0 and 1"
            few = DataSet(f"{source}_{labeled}_draw_{draw}_{MINUTES}_minutes", source, labeled, draw, **flags)
            every = DataSet(f"{source}_{cases}_{MINUTES}_minutes", source, cases, **flags)
            rows = {row: ROWS[row] for row in ("Supervised", SWITCH)}
            rows[LATE_ROW] = ("SwitchedSelfTraining", LATE_FLAGS)
            for row, (trainer, words) in rows.items():
                found.append(Job(row, few, trainer, draw, flags=tuple(words), table=table, minutes=MINUTES))
            found.append(Job(CEILING, every, "Supervised", draw, table=table, minutes=MINUTES))
    return found


if __name__ == "__main__":
    main(jobs(), __doc__, baseline="Supervised", ceiling=CEILING)
