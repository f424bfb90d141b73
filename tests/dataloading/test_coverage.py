from __future__ import annotations

import numpy as np
import pytest

from nnssl.dataloading.coverage import Coverage, estimate_coverage
from nnssl.dataloading.rows import RowsLoader


class Labels:
    """The facts about labels that nnU-Net's loader asks for."""

    all_labels = [0, 1, 2]  # noqa: RUF012
    has_ignore_label = False


class Cases:
    """Segmentations of 30x30x30 with a big structure in one corner and, in one case, a voxel in the other."""

    def __init__(self, cases: int = 4, rare_in: int = 0):
        self.identifiers = [f"case_{i}" for i in range(cases)]
        self.rare_in = rare_in

    def load_case(self, identifier: str):
        segmentation = np.zeros((1, 30, 30, 30), np.int8)
        segmentation[:, :12, :12, :12] = 1
        if identifier == f"case_{self.rare_in}":
            segmentation[:, 29, 29, 29] = 2
        locations = {label: np.argwhere(segmentation == label) for label in (1, 2)}
        return np.zeros(segmentation.shape, np.float32), segmentation, None, {"class_locations": locations}


def loader(cases: Cases, batch_size: int = 2) -> RowsLoader:
    return RowsLoader(cases, batch_size, (8, 8, 8), (8, 8, 8), Labels(), oversample_foreground_percent=0.33)


@pytest.fixture(autouse=True)
def seeded():
    np.random.seed(0)


def test_estimates_are_shares_of_patches():
    coverage = estimate_coverage(loader(Cases()), [1, 2])
    assert coverage.centered_share == 0.5
    assert coverage.cases == {1: ["case_0", "case_1", "case_2", "case_3"], 2: ["case_0"]}
    np.testing.assert_allclose(coverage.usual, [7 / 8, 1 / 8])
    np.testing.assert_array_equal(coverage.centered, [[1, 0], [0, 1]])
    assert 0 < coverage.uniform[0] < 1
    # centered patches show the rare class in one of eight, uniform ones nearly never
    assert coverage.shares()[1] == pytest.approx(0.5 / 8 + 0.5 * coverage.uniform[1])


def test_the_estimate_is_what_a_loader_shows():
    source = loader(Cases())
    coverage = estimate_coverage(source, [1, 2], most_cases=4)
    shown = np.mean([rare(source) for _ in range(1500)])
    assert coverage.shares()[1] == pytest.approx(shown, abs=0.03)


def rare(source: RowsLoader) -> float:
    return float((source.generate_train_batch()["target"] == 2).flatten(1).any(1).float().mean())


def made(usual, centered, centered_share=0.5) -> Coverage:
    cases = {k: ["a"] if np.any(centered[k]) else [] for k in range(len(usual))}
    return Coverage(cases, np.array(usual), np.array(centered), np.zeros(len(usual)), centered_share)


def test_what_suffices_stays():
    assert made([0.5, 0.5], np.eye(2)).balanced(0.2) is None
    assert made([0.9, 0.1], np.eye(2), centered_share=0.0).balanced(0.2) is None


@pytest.mark.parametrize(
    ("least", "share"),
    [
        (0.05, None),
        # by default 5 % of the patches show class 2, and half of the centered ones with both alike
        (0.1, (0.1 - 0.05) / (0.25 - 0.05)),
        # more than the balance of both classes gives
        (0.4, 1.0),
    ],
)
def test_as_little_is_changed_as_needed(least, share):
    coverage = made([0.9, 0.1], np.eye(2))
    balance = coverage.balanced(least)
    if share is None:
        assert balance is None
        return
    assert balance.share == pytest.approx(share)
    np.testing.assert_allclose(balance.probabilities, [0.5, 0.5])
    assert coverage.shares(balance).min() == pytest.approx(min(least, 0.25))


def test_what_would_hardly_help_is_left_alone():
    # twenty classes that never share a patch can only be shown alike, which nnU-Net nearly does
    usual = np.full(20, 0.05) + np.r_[-0.002, 0.002, np.zeros(18)]
    assert made(usual, np.eye(20)).balanced(0.05) is None


def test_a_class_that_no_case_has_changes_nothing():
    coverage = made([0.9, 0.1, 0.0], np.diag([1.0, 1.0, 0.0]))
    balance = coverage.balanced(0.1)
    np.testing.assert_allclose(balance.probabilities, [0.5, 0.5, 0.0])
    assert coverage.shares(balance)[2] == 0


def test_a_loader_shows_rare_classes_as_often_as_told():
    source = loader(Cases())
    coverage = estimate_coverage(source, [1, 2])
    balance = coverage.balanced(0.2)
    source.center_on(balance.share, balance.probabilities, coverage.cases)
    assert np.mean([rare(source) for _ in range(1500)]) == pytest.approx(0.2, abs=0.03)


def test_all_cases_that_have_a_class_are_drawn():
    source = loader(Cases())
    source.center_on(1.0, np.array([1.0, 0.0]), {1: ["case_1", "case_2", "case_3"], 2: ["case_0"]})
    drawn = [source.get_indices()[1] for _ in range(300)]
    counts = [drawn.count(f"case_{i}") for i in range(4)]
    assert counts[0] == 0
    assert min(counts[1:]) > 70


def test_of_many_cases_some_are_looked_at_and_one_with_each_class():
    for rare_in in (3, 29):
        cases = Cases(cases=30, rare_in=rare_in)
        looked_at = []
        real = cases.load_case
        source = loader(cases)
        source._data.load_case = lambda name, real=real, seen=looked_at: seen.append(name) or real(name)
        coverage = estimate_coverage(source, [1, 2], most_cases=5)
        assert coverage.cases[2] == [f"case_{rare_in}"]
        assert len(coverage.cases[1]) == 30
        np.testing.assert_array_equal(coverage.centered[1], [0, 1])
        assert coverage.usual.sum() == pytest.approx(1)
        # all for their classes, five for their patches
        assert len(looked_at) == 35


def test_regions_and_cases_without_any_class():
    cases = Cases(cases=1)
    real = cases.load_case

    def without_locations(identifier):
        image, segmentation, previous, _ = real(identifier)
        return image, segmentation, previous, {"class_locations": {(1, 2): [], 2: []}}

    cases.load_case = without_locations
    coverage = estimate_coverage(loader(cases), [(1, 2), 2])
    assert coverage.cases == {(1, 2): [], 2: []}
    assert coverage.usual.sum() == 0
    assert 0 < coverage.uniform[0] < 1
    assert coverage.uniform[0] >= coverage.uniform[1]
    assert coverage.balanced(0.5) is None
