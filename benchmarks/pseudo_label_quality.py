"""How good the pseudo-labels of a self-training are, and how well that was estimated (docs/few_labels.md).

    python benchmarks/pseudo_label_quality.py -o RUNS --only acdc_4_cv

For every finished round of the trainings of a queue (rounds.py, recommended.py), 3D files only: mean Dice of the
pseudo-labels against the hidden labels on the preprocessed grid, mean of ``estimated_dice``, rank correlation of both
over the cases, and the Dice of the better half by estimate and by stability.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.stats import spearmanr

from nnssl.dataloading.properties import read_properties
from nnssl.dataloading.pseudo_labeled import PseudoLabels
from nnssl.preprocessing.case import preprocess_mask
from nnssl.utils.files import read_json

HEAD = ("run", "round", "cases", "Dice", "estimated", "rank correlation", "better half by estimate", "by stability")


def true_dice(fold: Path, number: int, hidden: Path, preprocessed: Path) -> dict[str, float]:
    """Dice of the pseudo-labels of a round, mean over the classes that either mask has, by case."""
    plans = PlansManager(read_json(fold.parent / "plans.json"))
    configuration = plans.get_configuration(fold.parent.name.split("__")[2])
    labels = PseudoLabels(fold / f"round_{number}" / "pseudo_labels")
    folder = preprocessed / f"{configuration.data_identifier}_unlabeled"
    found = {}
    for file in sorted(hidden.glob("*.nii.gz")):
        case = file.name.removesuffix(".nii.gz")
        if case in labels:
            truth = preprocess_mask(str(file), read_properties(folder / f"{case}.pkl"), plans, configuration)
            found[case] = dice(labels.labels(case)[:], truth)
    return found


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """Mean over the classes that are in one of the two."""
    values = sorted({*np.unique(one).tolist(), *np.unique(other).tolist()} - {0, -1})
    if not values:
        return 1.0
    return float(
        np.mean([2 * ((one == v) & (other == v)).sum() / ((one == v).sum() + (other == v).sum()) for v in values])
    )


def row(fold: Path, number: int, truth: dict[str, float]) -> Sequence[str]:
    """What the table of the round says of these cases."""
    with open(fold / f"round_{number}" / "stability.csv", newline="", encoding="utf-8") as stream:
        facts = {line["case"]: line for line in csv.DictReader(stream) if line["case"] in truth}

    def half(measure: str, sign: int) -> str:
        known = sorted((case for case in facts if facts[case][measure]), key=lambda c: sign * float(facts[c][measure]))
        return f"{np.mean([truth[case] for case in known[: len(known) // 2]]):.4f}" if known else ""

    judged = [case for case in facts if facts[case]["estimated_dice"]]
    estimated = [float(facts[case]["estimated_dice"]) for case in judged]
    correlation = spearmanr(estimated, [truth[case] for case in judged]).statistic
    means = f"{np.mean(list(truth.values())):.4f}", f"{np.mean(estimated):.4f}", f"{correlation:.2f}"
    return str(number), str(len(truth)), *means, half("estimated_dice", -1), half("mean_instability", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", required=True, type=Path, metavar="FOLDER", help="of the queue")
    parser.add_argument("--only", nargs="+", default=[""], metavar="TEXT", help="runs whose name contains one of these")
    arguments = parser.parse_args()
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}")
    for table in sorted(arguments.o.glob("runs/*/*/*/*/*/fold_*/round_*/stability.csv")):
        fold, number = table.parents[1], int(table.parent.name.removeprefix("round_"))
        name = "/".join(fold.relative_to(arguments.o / "runs").parts[:3])
        if not any(text in name for text in arguments.only):
            continue
        data = arguments.o / "data" / name.split("/")[0]
        (preprocessed,) = (data / "preprocessed").glob("Dataset001_*")
        truth = true_dice(fold, number, data / "hidden" / "unlabeled", preprocessed)
        print(f"| {name} | {' | '.join(row(fold, number, truth))} |", flush=True)


if __name__ == "__main__":
    main()
