"""The rule on counts, and from label maps over the fingerprint's counts to the axes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nnssl.errors import UserError
from nnssl.planners.mirroring import decide, describe, find_obstacles, keeps_order
from nnssl.preprocessing.class_pairs import combine, pairs_in_case

SHAPE = (20, 24, 28)
LABELS: dict[str, int | list[int]] = {"background": 0, "front": 1, "back": 2}
IDENTITY = (0, 1, 2)


def labeled_case(
    seed: int, *, offset: tuple[float, float, float], contrast: float, jitter: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Noise with two balls of radius 3, ``offset`` (plus jitter) apart, whose means differ by ``contrast`` SDs."""
    rng = np.random.default_rng(seed)
    middle = np.array(SHAPE) / 2 + rng.uniform(-1, 1, 3)
    apart = np.array(offset) / 2 + rng.uniform(-jitter, jitter, 3)
    grid = np.moveaxis(np.indices(SHAPE), 0, -1)
    segmentation = np.zeros(SHAPE, np.int16)
    image = rng.normal(size=(1, *SHAPE))
    for label, center in ((1, middle - apart), (2, middle + apart)):
        segmentation[((grid - center) ** 2).sum(-1) <= 9] = label
    image[0][segmentation == 2] += contrast
    return image, segmentation


def evidence(cases: list[tuple[np.ndarray, np.ndarray]], labels: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    pairs = combine([[pairs_in_case(image, segmentation, labels)] for image, segmentation in cases])
    return {"labels": list(labels), "votes_of": "labeled cases", "pairs": pairs}


def pair(before: list[int], after: list[int], votes: int, *, overlap: float = 0.9, labels=(1, 2)) -> dict[str, Any]:
    return {"labels": list(labels), "overlap": overlap, "votes": votes, "before": before, "after": after}


def given(*pairs: dict[str, Any], labels: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return {"labels": list(labels), "votes_of": "labeled cases", "pairs": list(pairs)}


@pytest.mark.parametrize("number", [1, 2, 5, 20])
def test_an_axis_on_which_look_alike_classes_have_an_order_is_not_mirrored(number):
    cases = [labeled_case(seed, offset=(0, 8, 0), contrast=0) for seed in range(number)]
    found = decide("auto", evidence(cases), IDENTITY, LABELS)
    assert found.axes == (0, 2)
    (obstacle,) = found.obstacles
    assert (obstacle.axis, obstacle.agreeing, obstacle.votes) == (1, number, number)


@pytest.mark.parametrize("number", [1, 2, 5, 20])
def test_classes_of_different_intensity_are_mirrored(number):
    cases = [labeled_case(seed, offset=(0, 8, 0), contrast=4) for seed in range(number)]
    assert decide("auto", evidence(cases), IDENTITY, LABELS).axes == (0, 1, 2)


@pytest.mark.parametrize("number", [5, 20])
def test_an_order_that_changes_from_case_to_case_is_mirrored(number):
    offsets = [(0, 8 if seed % 2 else -8, 0) for seed in range(number)]
    cases = [labeled_case(seed, offset=offsets[seed], contrast=0) for seed in range(number)]
    assert decide("auto", evidence(cases), IDENTITY, LABELS).axes == (0, 1, 2)


@pytest.mark.parametrize("number", [1, 2, 5, 20])
def test_symmetric_classes_are_mirrored_along_the_axis_of_their_symmetry(number):
    cases = []
    for seed in range(number):
        image, segmentation = labeled_case(seed, offset=(0, 8, 0), contrast=0)
        # both classes again on the other side: left and right organs that share a label
        image, segmentation = np.roll(image, 6, 3), np.roll(segmentation, 6, 2)
        cases.append((image, np.maximum(segmentation, segmentation[:, :, ::-1])))
    assert decide("auto", evidence(cases), IDENTITY, LABELS).axes == (0, 2)


@pytest.mark.parametrize("number", [1, 20])
def test_a_single_class_is_mirrored(number):
    cases = [labeled_case(seed, offset=(0, 8, 0), contrast=0) for seed in range(number)]
    found = decide("auto", evidence(cases, labels=(1,)), IDENTITY, {"background": 0, "front": 1})
    assert found.axes == (0, 1, 2)
    assert found.pairs_without_case == 0


def test_another_value_than_the_classes_has_no_say():
    image, segmentation = labeled_case(0, offset=(0, 8, 0), contrast=0)
    labels: dict[str, int | list[int]] = {"background": 0, "front": 1, "ignore": 2}
    assert decide("auto", evidence([(image, segmentation)], labels=(1,)), IDENTITY, labels).axes == (0, 1, 2)


@pytest.mark.parametrize(
    ("before", "after", "votes", "kept"),
    [
        (1, 0, 1, True),
        (0, 2, 2, True),
        (1, 1, 2, False),
        (5, 0, 5, True),
        (4, 0, 5, False),  # a case without order counts against it
        (6, 0, 6, True),
        (5, 1, 6, False),
        (7, 1, 8, False),
        (0, 8, 9, True),
        (15, 5, 20, True),
        (14, 6, 20, False),
        (70, 30, 100, False),  # significant, but no cue
        (1, 18, 20, True),
        (0, 0, 3, False),
        (0, 0, 0, False),
    ],
)
def test_order_is_consistent(before, after, votes, kept):
    assert keeps_order(before, after, votes) is kept


def test_overlap_from_one_half_on_counts():
    assert find_obstacles([pair([4, 0, 0], [0, 0, 0], 4, overlap=0.5)], IDENTITY)
    assert not find_obstacles([pair([4, 0, 0], [0, 0, 0], 4, overlap=0.49)], IDENTITY)


def test_axes_are_those_of_the_preprocessed_arrays():
    # transpose_forward (2, 0, 1): the first preprocessed axis is the reader's last one
    transposed = decide("auto", given(pair([0, 0, 4], [0, 0, 0], 4)), (2, 0, 1), LABELS)
    assert transposed.axes == (1, 2)
    cases = [labeled_case(seed, offset=(8, 0, 0), contrast=0) for seed in range(4)]
    raw = decide("auto", evidence(cases), (2, 0, 1), LABELS)
    turned = [(image.transpose(0, 3, 1, 2), segmentation.transpose(2, 0, 1)) for image, segmentation in cases]
    assert raw.axes == decide("auto", evidence(turned), IDENTITY, LABELS).axes == (0, 2)


@pytest.mark.parametrize(("kept", "axes_3d", "axes_2d"), [(0, [1, 2], [0, 1]), (1, [0, 2], [1]), (2, [0, 1], [0])])
def test_2d_patches_have_the_last_two_axes(kept, axes_3d, axes_2d):
    before = [4 * (axis == kept) for axis in range(3)]
    decision = decide("auto", given(pair(before, [0, 0, 0], 4)), IDENTITY, LABELS)
    in_3d, in_2d = decision.entries(3), decision.entries(2)
    assert (in_3d["mirror_axes"], in_2d["mirror_axes"]) == (axes_3d, axes_2d)
    assert [entry["axis"] for entry in in_3d["mirror_evidence"]["kept"]] == [kept]
    assert [entry["axis"] for entry in in_2d["mirror_evidence"]["kept"]] == ([kept - 1] if kept else [])


def test_the_clearest_pair_is_named():
    labels: dict[str, int | list[int]] = {"background": 0, "a": 1, "b": 2, "c": 3, "d": [4]}
    pairs = [
        pair([3, 0, 0], [0, 0, 0], 3, labels=(1, 2), overlap=0.95),
        pair([4, 0, 0], [0, 0, 0], 4, labels=(1, 3), overlap=0.6),
        pair([0, 0, 0], [4, 0, 0], 4, labels=(2, 4), overlap=0.7),
    ]
    (kept,) = decide("auto", given(*pairs, labels=(1, 2, 3, 4)), IDENTITY, labels).entries(3)["mirror_evidence"]["kept"]
    assert kept == {"axis": 0, "classes": ["b", "d"], "overlap": 0.7, "in_order": 4, "of": 4, "other_pairs": 2}


@pytest.mark.parametrize(
    ("choice", "dimensions", "axes_3d", "axes_2d"),
    [
        ("all", 3, [0, 1, 2], [0, 1]),
        ("none", 3, [], []),
        ((2, 0), 3, [0, 2], [1]),
        ((0,), 2, None, [0]),
        ((0, 1), 2, None, [0, 1]),
        ("all", 2, None, [0, 1]),
    ],
)
def test_a_user_decides(choice, dimensions, axes_3d, axes_2d):
    decision = decide(choice, given(pair([4, 4, 4], [0, 0, 0], 4)), IDENTITY, LABELS, patch_dimensions=dimensions)
    assert decision.entries(2)["mirror_axes"] == axes_2d
    if axes_3d is not None:
        assert decision.entries(3)["mirror_axes"] == axes_3d
    evidence_of_user = {"decided_by": "--mirror-axes", "pairs_without_case": 0, "kept": []}
    assert decision.entries(2)["mirror_evidence"] == evidence_of_user


@pytest.mark.parametrize(("choice", "dimensions"), [((3,), 3), ((2,), 2), ((0, 7), 3)])
def test_axes_that_the_patch_does_not_have_are_refused(choice, dimensions):
    with pytest.raises(UserError, match=f"no axis {choice[-1]}"):
        decide(choice, given(), IDENTITY, LABELS, patch_dimensions=dimensions)


def plans_of(decision: Any, **dimensions: int) -> dict[str, Any]:
    blocks = {name: {"semi_supervised": decision.entries(number)} for name, number in dimensions.items()}
    return {"configurations": blocks | {"3d_cascade_fullres": {"inherits_from": "3d_fullres"}}}


def test_decision_and_evidence_are_told():
    counts = given(pair([0, 4, 0], [0, 0, 0], 4), labels=(1, 2, 3))
    decision = decide("auto", counts, IDENTITY, LABELS | {"rare": 3})
    assert describe(plans_of(decision, **{"2d": 2, "3d_fullres": 3})) == [
        "Mirrored axes: 2d 1; 3d_fullres 0, 2",
        "  3d_fullres axis 1 is not mirrored: front and back look alike (intensity overlap 0.90) and keep their order "
        "in 4 of 4 labeled cases",
        "  no labeled case has both classes of 2 pair(s), which had no say",
    ]


def test_without_evidence_that_is_told():
    found = describe(plans_of(decide("auto", given(labels=(1,)), IDENTITY, LABELS), **{"2d": 2}))
    assert found == ["Mirrored axes: 2d 0, 1", "  no classes that look alike keep an order"]
    found = describe(plans_of(decide("none", given(), IDENTITY, LABELS), **{"3d_fullres": 3}))
    assert found == ["Mirrored axes: 3d_fullres none (as --mirror-axes says)"]
    assert describe({"configurations": {"3d_fullres": {"patch_size": [1, 2, 3]}}}) == []


def test_values_of_regions_are_named_by_value():
    regions: dict[str, int | list[int]] = {"background": 0, "whole": [1, 2], "core": 2}
    (kept,) = decide("auto", given(pair([1, 0, 0], [0, 0, 0], 1)), IDENTITY, regions).entries(3)["mirror_evidence"][
        "kept"
    ]
    assert kept["classes"] == ["label 1", "core"]
