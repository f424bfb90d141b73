from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from nnssl.augmentation.regional_switch import RegionalSwitch
from nnssl.dataloading.correspondence import Correspondence, Frame
from nnssl.dataloading.mixed_pairs import ForegroundBoxes, MixedCases, MixedPairsLoader
from tests.dataloading.test_atlas_pairs import Annotated, Cases, Labels, batches

SHAPES = {"a": (30, 24, 20), "b": (15, 48, 20), "c": (30, 24, 40), "d": (24, 24, 24)}


def loader(labeled="ab", pseudo_labeled="cd", batch_size=4, labels=Labels, probability=1.0, **options):
    cases = MixedCases(Cases(labeled, SHAPES), Cases(pseudo_labeled, SHAPES))
    options = {"oversample_foreground_percent": 0.33} | options
    switch = RegionalSwitch(probability)
    patch = (8, 8, 8)
    return MixedPairsLoader(
        cases, batch_size, patch, patch, labels(), switch=switch, correspondence=Correspondence(), **options
    )


def test_every_pair_has_a_labeled_and_a_pseudo_labeled_case_and_all_cases_take_part():
    names = Counter()
    for batch in batches(loader(), 30):
        keys = list(batch["keys"])
        # the last row leads, and the pseudo-labeled case does
        assert [key in "ab" for key in keys] == [True, False] * 2
        names.update(keys)
    assert set(names) == set("abcd")
    assert min(names.values()) > 15  # of 120


def test_regions_are_exchanged_between_the_two_kinds():
    exchanged = 0
    for after, before in zip(batches(loader()), batches(loader(probability=0.0)), strict=True):
        assert list(after["keys"]) == list(before["keys"])
        a, b = (batch["target"].unflatten(0, (-1, 2)) for batch in (after, before))
        assert ((a == b) | (a == b.flip(1))).all()
        exchanged += int((a != b).sum())
    assert exchanged > 0


def test_a_labeled_case_that_shows_a_rare_class_leads_a_pair_too():
    source = loader(oversample_foreground_percent=1.0, probability=0.0)
    source.center_on(1.0, np.array([1.0]), {1: ["b"]})
    for batch in batches(source):
        assert [key in "cd" for key in batch["keys"]] == [True, False] * 2
        assert set(batch["keys"][1::2]) == {"b"}


def test_an_ignore_label_binds_the_labeled_cases_only():
    class Predicted(Cases):
        def load_case(self, identifier):
            *arrays, properties = super().load_case(identifier)
            locations = {
                key: voxels for key, voxels in properties["class_locations"].items() if not isinstance(key, tuple)
            }
            return *arrays, {"class_locations": locations}

    source = loader(labels=Annotated, oversample_foreground_percent=0.0)
    source._data.pseudo_labeled = Predicted("cd", SHAPES)
    first = np.array([batch["data"][1, 0].mean() for batch in batches(source, 20)])
    # anywhere, where the labeled cases of these tests are annotated beyond 0.8 of the first axis only
    assert first.min() < 0.5


def test_every_row_can_be_made_alone():
    whole, part = batches(loader(), 6), batches(loader(rows=range(2, 4)), 6)
    for a, b in zip(whole, part, strict=True):
        assert list(a["keys"][2:]) == list(b["keys"])
        assert torch.equal(a["data"][2:], b["data"])


@pytest.mark.parametrize(("labeled", "pseudo_labeled"), [("", "cd"), ("ab", "")])
def test_both_kinds_are_needed(labeled, pseudo_labeled):
    with pytest.raises(ValueError, match="labeled and a pseudo-labeled case"):
        loader(labeled, pseudo_labeled)


def test_boxes_of_pseudo_labeled_cases_are_those_of_their_foreground():
    class Stored:
        """What `PseudoLabels` knows about two cases."""

        def box(self, case):
            return {"c": [[0.25, 0.75], [0.4, 0.5], [0.5, 1]], "d": [[0, 1]] * 3}[case]

    class Predicted:
        pseudo_labels = Stored()
        identifiers = ("c", "d")

    known = Frame.of_box([(0, 1)] * 3)
    boxes = ForegroundBoxes({"a": known}, Predicted())
    assert (list(boxes), len(boxes)) == (["a", "c", "d"], 3)
    assert boxes["a"] is known
    corners = boxes["c"].from_common(np.array([[0, 0, 0], [1, 1, 1]]).T)
    np.testing.assert_allclose(corners.T, [[2 / 8, 4 / 10, 5 / 10], [6 / 8, 5 / 10, 1]])
    np.testing.assert_allclose(boxes["d"].from_common(np.ones((3, 1))), np.ones((3, 1)))
