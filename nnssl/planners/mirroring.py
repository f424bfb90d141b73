"""Which axes training and prediction may mirror.

Where classes look alike and are told apart by their place (anterior and posterior hippocampus, left and right
parotid gland), mirroring along the axis on which they lie apart destroys what tells them apart. So an axis is
mirrored unless a pair of classes looks alike and keeps its order of centroids along it (docs/augmentation.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any, Literal

from scipy.stats import binomtest

from nnssl.errors import UserError

MirrorChoice = Literal["auto", "all", "none"] | tuple[int, ...]

OVERRIDE = "--mirror-axes"
"""Who decided where a user did."""

LEAST_OVERLAP = 0.5
"""Intensity overlap from which on two classes look alike."""
SIGNIFICANCE = 0.05
LEAST_SHARE = 0.75
"""Share of cases below which an order is no cue worth keeping, however significant many cases make it."""
FEWEST_TESTED = 6
"""Number of cases from which on the sign test can be significant; fewer must be unanimous."""


@dataclass(frozen=True)
class Obstacle:
    """Two classes that look alike and keep their order along ``axis`` in ``agreeing`` of ``votes`` cases."""

    axis: int
    labels: tuple[int, int]
    overlap: float
    agreeing: int
    votes: int


def keeps_order(before: int, after: int, votes: int) -> bool:
    """Whether an order of centroids that ``before`` and ``after`` cases of ``votes`` have is consistent.

    Cases without order count as disagreement. With six and more cases the order of the majority must be significant
    in a two-sided sign test and that of three quarters of the cases; five cases can never be significant, so that up
    to there all must agree: a cue that may exist is kept, as its loss costs more than that of some augmentation.
    """
    agreeing = max(before, after)
    if votes < FEWEST_TESTED:
        return 0 < agreeing == votes
    return agreeing >= LEAST_SHARE * votes and bool(binomtest(agreeing, votes).pvalue <= SIGNIFICANCE)


def find_obstacles(pairs: Iterable[dict[str, Any]], transpose_forward: Sequence[int]) -> list[Obstacle]:
    """What stands against mirroring, the clearest first.

    Args:
        pairs: as from `nnssl.preprocessing.class_pairs.combine`, axes in the order of the reader.
        transpose_forward: nnU-Net's, the reader's axis for each axis of the preprocessed arrays.

    Returns:
        Obstacles by axes of the preprocessed arrays.
    """
    found = [
        Obstacle(axis, tuple(pair["labels"]), pair["overlap"], max(before, after), pair["votes"])
        for pair in pairs
        if pair["overlap"] >= LEAST_OVERLAP
        for axis, source in enumerate(transpose_forward)
        if keeps_order(before := pair["before"][source], after := pair["after"][source], pair["votes"])
    ]
    return sorted(found, key=lambda obstacle: (-obstacle.agreeing, -obstacle.overlap, obstacle.labels))


@dataclass(frozen=True)
class MirrorDecision:
    """Which axes are mirrored, and why; axes are those of the preprocessed 3D arrays.

    Attributes:
        axes: the mirrored ones.
        decided_by: ``labeled cases`` or ``groups of labeled cases``, or ``--mirror-axes``.
        obstacles: what stands against the other axes, the clearest first; none if a user decided.
        pairs_without_case: number of pairs of classes that no labeled case has both of, so that they had no say.
        labels: ``labels`` of dataset.json.
    """

    axes: tuple[int, ...]
    decided_by: str
    obstacles: tuple[Obstacle, ...]
    pairs_without_case: int
    labels: dict[str, int | list[int]]

    def entries(self, dimensions: int) -> dict[str, Any]:
        """``mirror_axes`` and ``mirror_evidence`` for the plan of a configuration, by the axes of its patch.

        A 2D configuration cuts the arrays perpendicular to their first axis, so its axes 0 and 1 are their 1 and 2.
        """
        shift = 3 - dimensions
        kept = [[o for o in self.obstacles if o.axis == axis] for axis in range(shift, 3)]
        return {
            "mirror_axes": [axis - shift for axis in self.axes if axis >= shift],
            "mirror_evidence": {
                "decided_by": self.decided_by,
                "pairs_without_case": self.pairs_without_case,
                "kept": [self._kept(obstacles, shift) for obstacles in kept if obstacles],
            },
        }

    def _kept(self, obstacles: list[Obstacle], shift: int) -> dict[str, Any]:
        first = obstacles[0]
        return {
            "axis": first.axis - shift,
            "classes": [_name(label, self.labels) for label in first.labels],
            "overlap": first.overlap,
            "in_order": first.agreeing,
            "of": first.votes,
            "other_pairs": len(obstacles) - 1,
        }


def decide(
    choice: MirrorChoice,
    evidence: dict[str, Any],
    transpose_forward: Sequence[int],
    labels: dict[str, int | list[int]],
    *,
    patch_dimensions: int = 3,
) -> MirrorDecision:
    """The decision for all configurations of a plan.

    Args:
        choice: ``auto`` (by the labeled cases), ``all``, ``none``, or axes of the patch.
        evidence: entry ``class_pairs`` of the fingerprint.
        transpose_forward: nnU-Net's, the reader's axis for each axis of the preprocessed arrays.
        labels: ``labels`` of dataset.json.
        patch_dimensions: 3, or 2 if there are 2D configurations only; the axes of ``choice`` are counted so.

    Raises:
        UserError: ``choice`` names an axis that the patch does not have.
    """
    if choice != "auto":
        return MirrorDecision(_chosen_axes(choice, patch_dimensions), OVERRIDE, (), 0, labels)
    obstacles = find_obstacles(evidence["pairs"], transpose_forward)
    axes = tuple(axis for axis in range(3) if all(obstacle.axis != axis for obstacle in obstacles))
    unseen = comb(len(evidence["labels"]), 2) - len(evidence["pairs"])
    return MirrorDecision(axes, evidence["votes_of"], tuple(obstacles), unseen, labels)


def describe(plans: dict[str, Any]) -> list[str]:
    """The decisions of all configurations and what decided, in a few lines; none for plans without decisions."""
    blocks = {
        name: configuration["semi_supervised"]
        for name, configuration in plans["configurations"].items()
        if "mirror_evidence" in configuration.get("semi_supervised", {})
    }
    if not blocks:
        return []
    axes = {name: ", ".join(map(str, block["mirror_axes"])) or "none" for name, block in blocks.items()}
    head = "Mirrored axes: " + "; ".join(f"{name} {text}" for name, text in axes.items())
    shown = "3d_fullres" if "3d_fullres" in blocks else next(iter(blocks))
    evidence = blocks[shown]["mirror_evidence"]
    if evidence["decided_by"] == OVERRIDE:
        return [f"{head} (as {OVERRIDE} says)"]
    lines = [f"  {shown} {_sentence(kept, evidence['decided_by'])}" for kept in evidence["kept"]]
    unseen = evidence["pairs_without_case"]
    if unseen:
        lines.append(f"  no labeled case has both classes of {unseen} pair(s), which had no say")
    return [head, *(lines if evidence["kept"] else ["  no classes that look alike keep an order", *lines])]


def _sentence(kept: dict[str, Any], voters: str) -> str:
    others = kept["other_pairs"]
    return (
        f"axis {kept['axis']} is not mirrored: {' and '.join(kept['classes'])} look alike (intensity overlap "
        f"{kept['overlap']:.2f}) and keep their order in {kept['in_order']} of {kept['of']} {voters}"
        + (f"; {others} more pair(s) do so" if others else "")
    )


def _name(label: int, labels: dict[str, int | list[int]]) -> str:
    # regions have several values, and a value may be in several regions
    return next((name for name, value in labels.items() if value in (label, [label])), f"label {label}")


def _chosen_axes(choice: MirrorChoice, dimensions: int) -> tuple[int, ...]:
    if choice in ("all", "none"):
        return (0, 1, 2) if choice == "all" else ()
    wrong = [axis for axis in choice if axis not in range(dimensions)]
    if wrong:
        raise UserError(
            f"the patch has no axis {wrong[0]} to mirror",
            expected=f"auto, all, none, or axes out of {', '.join(map(str, range(dimensions)))}",
        )
    return tuple(sorted({int(axis) + 3 - dimensions for axis in choice}))
