"""Methods in 2D with eight labeled images: heads in ultrasound and nuclei in microscopy (docs/benchmarks.md).

First the mixing family in a few equal steps, then methods of both families and the regional switch in the same minutes,
where a draw of the labeled images has a seed of its own for the training. `auto` chooses the switch on hc18,
and `Supervised` on kdsb18, whose nuclei have no common place.
"""

from __future__ import annotations

from jobs import DataSet, Job, main
from methods import CEILING, RECIPE, SWITCH

LABELED = 8
# source: images in its training pool, flags of nnssl_split
SETS = {
    "hc18": (243, ("--channel-names", "US", "--group-regex", r"((?:test_)?\d+)_")),
    "kdsb18": (120, ()),
}
NAMES = ("Supervised", "MeanTeacher", "BCP", "M3HL", "CAD", "C3S3")
EPOCHS, STEPS_PER_EPOCH = 5, 40
TIMED = ("Supervised", SWITCH, "MeanTeacher", "SelfTraining", "BCP", "SwitchedSelfTraining")
MINUTES = 5.0


def images(source: str, labeled: int, draw: int = 0, end: str = "") -> DataSet:
    """A label budget, planned in 2D."""
    return DataSet(f"{source}_{labeled}{end}", source, labeled, draw, source_flags=SETS[source][1], configuration="2d")


def brief(row: str, labeled: int, seed: int) -> Job:
    """A training of 200 steps on ultrasound."""
    table = f"hc18 in 2D, {LABELED} labeled images, {EPOCHS * STEPS_PER_EPOCH} steps"
    trainer = "Supervised" if row == CEILING else row
    return Job(row, images("hc18", labeled), trainer, seed, EPOCHS, STEPS_PER_EPOCH, RECIPE, (), table)


def timed(row: str, source: str, labeled: int, draw: int) -> Job:
    """A training of five minutes."""
    table = f"{source} in 2D, {LABELED} labeled images, {MINUTES:g} minutes, draws 0 and 1"
    trainer = {CEILING: "Supervised", SWITCH: "SwitchedSupervised"}.get(row, row)
    end = "_timed" if row == CEILING else f"_draw_{draw}_timed"
    dataset = images(source, labeled, 0 if row == CEILING else draw, end)
    return Job(row, dataset, trainer, draw, table=table, minutes=MINUTES)


def jobs() -> list[Job]:
    """Seed by seed, draw by draw."""
    everything = SETS["hc18"][0]
    found = []
    for seed in (0, 1):
        found += [brief(row, LABELED, seed) for row in NAMES]
        found.append(brief(CEILING, everything, seed))
    for draw in (0, 1):
        for source, (pool, _) in SETS.items():
            found += [timed(row, source, LABELED, draw) for row in TIMED]
            found.append(timed(CEILING, source, pool, draw))
    return found


if __name__ == "__main__":
    main(jobs(), __doc__, baseline="Supervised", ceiling=CEILING)
