"""Two annotated scans: hippocampus and brain structures with two labeled cases, two draws of them (docs/benchmarks.md).

All rows of a set have the same number of steps; registration is not trained. On hippocampus the parts of EFSMedSeg are
taken away one at a time as well. Rows with registered labels learn from all cases at once, labels of the unlabeled ones
being those of the labeled cases after registration. A draw has a seed of its own for the training, too.
"""

from __future__ import annotations

from dataclasses import replace

from jobs import DataSet, Job, main
from methods import CEILING, RECIPE
from short_budgets import BRIEF

STEPS_PER_EPOCH = 40
SWITCH = ("--atlas-augmentation", "regional_switch")
# row: trainer, hyper-parameters, flags
ROWS = {
    "Supervised": ("Supervised", (), ()),
    "Supervised, regional switch": ("Supervised", (), SWITCH),
    "MeanTeacher": ("MeanTeacher", (), ()),
    "SelfTraining": ("SelfTraining", (), ()),
    "SwitchedSelfTraining": ("SwitchedSelfTraining", (), ()),
    "AtlasRegistration": ("AtlasRegistration", (), ()),
    "EFSMedSeg": ("EFSMedSeg", (), ()),
}
# rows that begin with the registered labels of the two cases
REGISTERED = {
    "SelfTraining, registered labels": ("SelfTraining", ("rounds=1",), ()),
    "SwitchedSelfTraining, registered labels": ("SwitchedSelfTraining", ("rounds=1", "round_shares=()"), ()),
}
PARTS = {
    "EFSMedSeg, no switch": ("EFSMedSeg", (), ("--atlas-augmentation", "none")),
    "EFSMedSeg, no Dice weights": ("EFSMedSeg", ("dice_weight=0",), ()),
    "EFSMedSeg, no reconstruction": ("EFSMedSeg", ("reconstruction_weight=0", "kl_weight=0"), ()),
    "EFSMedSeg, no contrast": ("EFSMedSeg", ("contrast_weight=0",), ()),
}
# source: cases in all, epochs, hyper-parameters, rows; 16 structures are learned late with RECIPE (docs/few_labels.md)
SETS = {
    "hippocampus": (160, 10, RECIPE, ROWS | REGISTERED | PARTS),
    "oasis35_2mm": (15, 6, (BRIEF,), ROWS | REGISTERED),
}


def jobs() -> list[Job]:
    """Set by set, draw by draw."""
    found = []
    for source, (cases, epochs, recipe, rows) in SETS.items():
        table = f"{source}, 2 labeled cases, {epochs * STEPS_PER_EPOCH} steps, draws 0 and 1"
        for draw in (0, 1):
            few = DataSet(f"{source}_2_draw_{draw}", source, labeled=2, draw=draw)
            every = DataSet(f"{source}_{cases}", source, labeled=cases)
            for row, (trainer, overrides, flags) in rows.items():
                job = Job(row, few, trainer, draw, epochs, STEPS_PER_EPOCH, recipe + overrides, flags, table)
                found.append(replace(job, from_registration=row in REGISTERED))
            found.append(Job(CEILING, every, "Supervised", draw, epochs, STEPS_PER_EPOCH, recipe, (), table))
    return found


if __name__ == "__main__":
    main(jobs(), __doc__, baseline="Supervised", ceiling=CEILING)
