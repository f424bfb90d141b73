"""Dice against the number of unlabeled and of labeled cases, in the same steps (docs/choosing.md).

    python benchmarks/amounts.py -o RUNS --data DATA --core 0
    python benchmarks/amounts.py -o RUNS --data DATA --table
    python benchmarks/amounts.py -o RUNS --figures docs/figures

Hippocampus, test cases, `auto` and `Supervised`, two draws of the labeled cases; smaller sets of unlabeled cases are
parts of larger ones. They are counted with two labeled cases, with which `auto` uses them; with eight and more it
chooses `Supervised` and has its row. Registration comes on top of the steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from jobs import DataSet, Job, main
from short_budgets import BRIEF

from nnssl.trainers.choosing import MOST_SWITCHED

EPOCHS, STEPS_PER_EPOCH = 20, 40
DRAWS = (0, 1)
NAMES = ("--channel-names", "MRI")
ROWS = ("Supervised", "auto")
LABELED, UNLABELED, ALL = 2, (0, 16, 64), 158
BUDGETS = (2, 4, 8, 16)


def job(row: str, labeled: int, unlabeled: int | None, draw: int) -> Job:
    """A training with so many labeled cases, and so many unlabeled ones of those that are left (None: all)."""
    name, flags, trainer = f"hippocampus_{labeled}_draw_{draw}_amounts", NAMES, row
    if unlabeled is not None:
        name, flags = f"{name}_{unlabeled}_unlabeled", (*NAMES, "--unlabeled", str(unlabeled))
    if labeled > MOST_SWITCHED:
        row = trainer = "Supervised"
    dataset = DataSet(name, "hippocampus", labeled, draw, source_flags=flags)
    return Job(row, dataset, trainer, draw, EPOCHS, STEPS_PER_EPOCH, (BRIEF,))


def jobs() -> list[Job]:
    """Draw by draw; `Supervised` does not depend on the unlabeled cases."""
    found = []
    for draw in DRAWS:
        found += [job("auto", LABELED, unlabeled, draw) for unlabeled in (None, *UNLABELED)]
        found += [job("Supervised", labeled, None, draw) for labeled in BUDGETS]
        found += [job("auto", labeled, None, draw) for labeled in BUDGETS if LABELED < labeled <= MOST_SWITCHED]
    return found


def figures(folder: Path, target: Path) -> None:
    """Two pictures: mean and draws of what is done."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from nnssl.report.figures import style

    def points(row: str, amounts: dict[int, tuple[int, int | None]]) -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        for amount, (labeled, unlabeled) in amounts.items():
            for draw in DRAWS:
                file = folder / "results" / f"{job(row, labeled, unlabeled, draw).key}.json"
                if file.is_file():
                    result: dict[str, Any] = json.loads(file.read_text())
                    found.setdefault(amount, []).append(result["Dice"])
        return found

    everything: dict[int, tuple[int, int | None]] = {number: (LABELED, number) for number in UNLABELED}
    everything[ALL] = (LABELED, None)
    by_labels: dict[int, tuple[int, int | None]] = {number: (number, None) for number in BUDGETS}
    target.mkdir(parents=True, exist_ok=True)
    for name, label, amounts in (
        ("dice_by_unlabeled", f"unlabeled cases ({LABELED} labeled)", everything),
        ("dice_by_labeled", f"labeled cases ({ALL} to {ALL - max(BUDGETS) + LABELED} unlabeled)", by_labels),
    ):
        figure, ax = pyplot.subplots(figsize=(4.8, 3.2), layout="constrained")
        for number, row in enumerate(ROWS):
            shown = points(row, amounts)
            if row == "Supervised" and amounts is everything and ALL in shown:
                # it uses none of them
                shown = dict.fromkeys(amounts, shown[ALL])
            places = [list(amounts).index(amount) for amount in shown]
            means = [float(np.mean(values)) for values in shown.values()]
            ax.plot(places, means, marker=style(number).marker, label=row, **style(number).line)
            for place, values in zip(places, shown.values(), strict=True):
                ax.plot([place] * len(values), values, ".", color=style(number).color, alpha=0.5)
        ax.set_xticks(range(len(amounts)), [str(amount) for amount in amounts])
        ax.set(xlabel=label, ylabel="Dice, hippocampus, 40 test cases")
        figure.legend(loc="outside upper center", ncols=len(ROWS), frameon=False)
        figure.savefig(target / f"{name}.png", dpi=160)
        pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-o", type=Path)
    parser.add_argument("--figures", type=Path)
    known, _ = parser.parse_known_args()
    if known.figures is not None:
        figures(known.o, known.figures)
    else:
        main(jobs(), __doc__, baseline="Supervised")
