"""Which axes the mirror rule of the planner leaves out, for draws of few labeled cases and with all labels.

    python benchmarks/mirror_rule.py hippocampus acdc_crop --group-regex 'acdc_crop=(patient\\d+)_' --labeled 1 2 4

Folders are sources of `nnssl_split` (``images/``, ``labels/``); the draws are those of ``nnssl_split --labeled N --seed
0``, ``1``, ... Axes are those of the arrays as the reader delivers them, which are those of the preprocessed arrays
unless nnU-Net transposes them (where the spacing of another axis than the first is the largest); of PNG images those
of the 2D patch. Two tables in Markdown: the decisions, and what decided for each axis with all labels.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnssl.dataset.budget import draw_budget
from nnssl.dataset.groups import group_cases, source_groups
from nnssl.dataset.parallel import map_cases
from nnssl.dataset.source import Source, open_source
from nnssl.planners.mirroring import LEAST_OVERLAP, decide
from nnssl.preprocessing.class_pairs import Pair, PairInCase, combine, pairs_in_case
from nnssl.preprocessing.fingerprint import class_values


def main() -> None:
    arguments = _parser().parse_args()
    patterns = dict(text.split("=", 1) for text in arguments.group_regex)
    decisions, reasons = [], []
    for folder in arguments.folders:
        dimensions = 2 if any((folder / "images").glob("*.png")) else 3
        channels = ["MRI"] if dimensions == 3 else None
        source = open_source(folder, channel_names=channels, num_processes=arguments.np)
        groups = source_groups(folder, source.pool, pattern=patterns.get(folder.name))
        cases = map_cases(
            _pairs,
            {case: (source, case) for case in source.pool},
            num_processes=arguments.np,
            description=folder.name,
        )

        for number in arguments.labeled:
            drawn = [
                draw_budget(source.pool, labeled=number, seed=seed, groups=groups).labeled
                for seed in range(arguments.draws)
            ]
            found = Counter(_decide(source, _counted(cases, draw, groups), dimensions)[0] for draw in drawn)
            text = "; ".join(f"{axes} ({times} of {len(drawn)})" for axes, times in found.most_common())
            decisions.append((folder.name, str(number), text))
        pairs = _counted(cases, source.pool, groups)
        mirrored, obstacles = _decide(source, pairs, dimensions)
        decisions.append((folder.name, f"{len(source.pool)} (all)", mirrored))
        reasons += _reasons(folder.name, source, pairs, obstacles, dimensions)
    _print_table(("data set", "labeled cases", "mirrored axes (draws)"), decisions)
    _print_table(("data set", "axis", "mirrored", "clearest pair that looks alike", "overlap", "in order"), reasons)


def _pairs(source: Source, case: str) -> dict[Pair, PairInCase]:
    reader = source.reader_class()
    image, _ = reader.read_images(source.images[case])
    segmentation, _ = reader.read_seg(source.labels[case])
    if source.label_map:
        segmentation = np.vectorize(source.label_map.__getitem__)(segmentation)
    image, segmentation, _ = crop_to_nonzero(image, segmentation)
    return pairs_in_case(image, segmentation[0], class_values(source.dataset_json["labels"]))


def _counted(
    cases: dict[str, dict[Pair, PairInCase]], labeled: Sequence[str], groups: dict[str, str] | None
) -> list[dict[str, Any]]:
    return combine([[cases[case] for case in unit] for unit in group_cases(labeled, groups)])


def _decide(source: Source, pairs: list[dict[str, Any]], dimensions: int) -> tuple[str, dict[int, int]]:
    """The mirrored axes, and for each other one the number of pairs that stand against it."""
    labels = source.dataset_json["labels"]
    evidence = {"labels": class_values(labels), "votes_of": "labeled cases", "pairs": pairs}
    entries = decide("auto", evidence, (0, 1, 2), labels).entries(dimensions)
    kept = {kept["axis"]: 1 + kept["other_pairs"] for kept in entries["mirror_evidence"]["kept"]}
    return ", ".join(map(str, entries["mirror_axes"])) or "none", kept


def _reasons(
    name: str, source: Source, pairs: list[dict[str, Any]], obstacles: dict[int, int], dimensions: int
) -> list[tuple[str, ...]]:
    """Per axis the pair of classes that look alike whose order is the clearest."""
    names = {value: label for label, value in source.dataset_json["labels"].items()}
    alike = [pair for pair in pairs if pair["overlap"] >= LEAST_OVERLAP]
    if not alike:
        return [(name, "all", "yes", "none", "", "")]
    rows = []
    for axis in range(dimensions):
        place = axis + 3 - dimensions
        agreeing, pair = max(
            ((max(pair["before"][place], pair["after"][place]), pair) for pair in alike),
            key=lambda entry: (entry[0] / entry[1]["votes"], entry[1]["overlap"]),
        )
        rows.append(
            (
                name,
                str(axis),
                f"no ({obstacles[axis]} of {len(alike)} pair(s))" if axis in obstacles else "yes",
                ", ".join(names[label] for label in pair["labels"]),
                f"{pair['overlap']:.2f}",
                f"{agreeing} of {pair['votes']}",
            )
        )
    return rows


def _print_table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    print()
    for row in (head, ("---",) * len(head), *rows):
        print("| " + " | ".join(row) + " |")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="folders with images/, labels/ and split.json")
    add("--labeled", nargs="+", type=int, default=[1, 2, 4], help="numbers of labeled cases (default: 1 2 4)")
    add("--draws", type=int, default=10, help="draws of each number (default: 10)")
    add("--group-regex", nargs="+", default=[], metavar="NAME=REGEX", help="cases of one patient, by folder name")
    add("-np", type=int, default=2, help="processes (default: 2)")
    return parser


if __name__ == "__main__":
    main()
