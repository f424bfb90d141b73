"""Where positions of two labeled cases correspond, for methods that exchange parts of them.

Relative coordinates will do where all images show the same section of the body. Where they do not, the box around the
foreground of each case, or a registration, may bring the classes of two cases nearer to each other; so what brings them
nearest is taken (docs/augmentation.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnssl.dataloading.correspondence import Kind
from nnssl.preprocessing.class_places import Overlap

LEAST_GAIN = 0.02
"""Overlap beyond chance that a correspondence must gain to be preferred to a simpler one."""
LEAST_OVERLAP = 0.1
"""Overlap beyond chance below which classes have no common place."""

_ORDER: tuple[Kind, ...] = ("relative", "bbox", "registration")
_NAMES = {
    "relative": "relative coordinates",
    "bbox": "coordinates of the foreground box",
    "registration": "coordinates of the registration",
}


@dataclass(frozen=True)
class CorrespondenceDecision:
    """What was decided for all configurations of a plan.

    Attributes:
        kind: where positions correspond.
        overlaps: what was compared, in the order of simplicity.
        pairs: number of pairs of labeled cases that were compared; 0 with a single one.
    """

    kind: Kind
    overlaps: Mapping[Kind, Overlap]
    pairs: int

    @property
    def common_place(self) -> bool:
        """Whether classes of different cases have a place in common."""
        return self.pairs > 0 and self.overlaps[self.kind].beyond_chance >= LEAST_OVERLAP

    def entries(self) -> dict[str, Any]:
        """``atlas_correspondence`` and ``atlas_evidence`` for the plan of a configuration."""
        overlaps = {
            kind: {
                "dice": round(overlap.dice, 4),
                "chance": round(overlap.chance, 4),
                "beyond_chance": round(overlap.beyond_chance, 4),
            }
            for kind, overlap in self.overlaps.items()
        }
        return {
            "atlas_correspondence": self.kind,
            "atlas_evidence": {"pairs": self.pairs, "common_place": self.common_place, "overlap": overlaps},
        }


def decide(places: dict[str, Any], alignment: dict[str, Any] | None) -> CorrespondenceDecision:
    """The correspondence with the largest overlap beyond chance; a simpler one if that gains less than `LEAST_GAIN`.

    Args:
        places: entry ``class_places`` of the fingerprint.
        alignment: summary of the alignment of labeled cases, if they were aligned.
    """
    measured = dict(places["overlap"])
    if alignment is not None:
        measured["registration"] = alignment["overlap"]
    overlaps = {kind: Overlap(**measured[kind]) for kind in _ORDER if kind in measured}
    best: Kind = "relative"
    for kind, overlap in overlaps.items():
        if overlap.beyond_chance >= overlaps[best].beyond_chance + LEAST_GAIN:
            best = kind
    return CorrespondenceDecision(best, overlaps, places["pairs"])


def describe(plans: dict[str, Any]) -> list[str]:
    """The decision in a line or two; none for plans without it, or with a single labeled case."""
    block = next(
        (
            configuration["semi_supervised"]
            for configuration in plans["configurations"].values()
            if configuration.get("semi_supervised", {}).get("atlas_evidence", {}).get("pairs")
        ),
        None,
    )
    if block is None:
        return []
    evidence = block["atlas_evidence"]
    measured = "; ".join(
        f"{overlap['beyond_chance']:.2f} in {_NAMES[kind]} (Dice {overlap['dice']:.2f}, by chance "
        f"{overlap['chance']:.2f})"
        for kind, overlap in evidence["overlap"].items()
    )
    lines = [
        f"Labeled cases correspond in {_NAMES[block['atlas_correspondence']]}",
        f"  overlap of their classes beyond chance, {evidence['pairs']} pair(s): {measured}",
    ]
    if not evidence["common_place"]:
        lines.append("  that is little: the classes have no common place, and --atlas-augmentation may not help")
    return lines
