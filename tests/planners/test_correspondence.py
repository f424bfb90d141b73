from __future__ import annotations

from typing import Any

import pytest

from nnssl.planners.correspondence import decide, describe


def places(pairs: int = 3, **overlaps: float) -> dict[str, Any]:
    """Facts in which Dice and chance are such that the overlap beyond chance is as given."""
    return {
        "pairs": pairs,
        "overlap": {kind: {"dice": value / 2 + 0.5, "chance": 0.5} for kind, value in overlaps.items()},
    }


def alignment(value: float) -> dict[str, Any]:
    return {"kind": "affine", "reference": "a", "overlap": {"dice": value, "chance": 0.0}}


@pytest.mark.parametrize(
    ("relative", "bbox", "aligned", "kind"),
    [
        (0.6, 0.61, None, "relative"),
        (0.6, 0.63, None, "bbox"),
        (0.6, 0.3, None, "relative"),
        (0.6, 0.61, 0.61, "relative"),
        (0.6, 0.61, 0.63, "registration"),
        (0.5, 0.6, 0.61, "bbox"),
        (0.5, 0.6, 0.7, "registration"),
    ],
)
def test_what_overlaps_best_is_taken_and_what_is_simple_if_that_is_as_good(relative, bbox, aligned, kind):
    summary = None if aligned is None else alignment(aligned)
    assert decide(places(relative=relative, bbox=bbox), summary).kind == kind


@pytest.mark.parametrize(("relative", "common"), [(0.05, False), (0.3, True)])
def test_a_common_place_is_more_than_chance(relative, common):
    entries = decide(places(relative=relative, bbox=0.0), None).entries()
    assert entries["atlas_evidence"]["common_place"] is common
    assert entries["atlas_evidence"]["overlap"]["relative"]["beyond_chance"] == pytest.approx(relative)
    text = "\n".join(describe({"configurations": {"3d_fullres": {"semi_supervised": entries}}}))
    assert f"{relative:.2f} in relative coordinates" in text
    assert ("no common place" in text) is not common


def test_a_single_case_decides_nothing():
    decision = decide(places(pairs=0, relative=0.0, bbox=0.0), None)
    assert (decision.kind, decision.common_place) == ("relative", False)
    assert describe({"configurations": {"2d": {"semi_supervised": decision.entries()}}}) == []


def test_plans_of_others_have_nothing_to_tell():
    assert describe({"configurations": {"2d": {}}}) == []
