from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from nnssl.evaluation.statistics import (
    bootstrap_interval,
    holm,
    paired_statistics,
    rank_biserial,
    ratio_interval,
    signed_rank_p,
    smallest_p,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("n", [8, 40, 80])
def test_p_value_is_that_of_scipy(n):
    values = RNG.normal(0.1, 0.3, n)
    assert signed_rank_p(values) == pytest.approx(stats.wilcoxon(values).pvalue, rel=1e-6)


def test_exact_p_value_counts_all_signs():
    """Of all 2^7 choices of signs, those with a rank sum at least as far from the middle."""
    values = np.array([0.3, -0.1, 0.7, 0.2, 0.9, -0.4, 1.1])
    ranks = stats.rankdata(np.abs(values))
    observed = abs((ranks * np.sign(values)).sum())
    sums = [abs(np.dot(ranks, signs)) for signs in itertools.product((-1, 1), repeat=7)]
    assert signed_rank_p(values) == pytest.approx(np.mean(np.array(sums) >= observed - 1e-9))


def test_ties_and_rounding_do_not_decide():
    assert signed_rank_p([0.0, 1e-12, -1e-13]) == 1
    values = [0.1, 0.2, -0.3, 0.4, 0.5]
    assert signed_rank_p([*values, 0, 0]) == pytest.approx(signed_rank_p(values))
    # 0.1 + 0.2 is not 0.3, but has its rank
    assert rank_biserial([0.1 + 0.2, -0.3]) == 0


@pytest.mark.parametrize("n", [1, 5, 6, 12])
def test_smallest_p_is_that_of_a_unanimous_result(n):
    assert smallest_p(n) == pytest.approx(signed_rank_p(np.arange(1.0, n + 1)))


def test_rank_biserial():
    assert rank_biserial([1, 2, 3]) == 1
    assert rank_biserial([-1, -2]) == -1
    assert rank_biserial([0, 0]) == 0
    # ranks 1 to 4, of which 3 is negative
    assert rank_biserial([1, 2, -3, 4]) == pytest.approx((7 - 3) / 10)


def test_interval_is_that_of_scipy_and_covers_the_mean():
    values = RNG.exponential(1.0, 30)
    expected = stats.bootstrap((values,), np.mean, n_resamples=10_000, rng=0).confidence_interval
    assert bootstrap_interval(values) == pytest.approx((expected.low, expected.high))
    assert bootstrap_interval(values) == bootstrap_interval(values)
    low, high = bootstrap_interval(values)
    t = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    assert low < values.mean() < high
    assert (low, high) == pytest.approx(t, abs=0.2)


@pytest.mark.parametrize("values", [[], [0.1], [0.1, 0.2], [0.3] * 5])
def test_no_interval_without_spread(values):
    assert bootstrap_interval(values) is None


def test_ratio():
    gap = RNG.normal(0.2, 0.02, 40)
    low, high = ratio_interval(gap / 2, gap)
    assert (low, high) == pytest.approx((0.5, 0.5))
    low, high = ratio_interval(gap / 2 + RNG.normal(0, 0.05, 40), gap)
    assert low < 0.5 < high
    assert ratio_interval(gap, RNG.normal(0, 1, 40)) is None
    assert ratio_interval([1.0, 1.0], [1.0, 2.0]) is None


def test_holm():
    assert holm([0.01]) == [0.01]
    # 3 * 0.01, then 2 * 0.02, then the larger of 1 * 0.03 and what came before
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    p = RNG.uniform(size=6)
    corrected = np.array(holm(p))
    assert (corrected <= np.minimum(1, p * 6) + 1e-12).all()
    assert (corrected >= p).all()
    assert holm([]) == []


def test_counts_and_unusable_values():
    found = paired_statistics([0.1, 0.0, -0.2, 0.3])
    assert (found.n, found.positive, found.ties, found.negative) == (4, 2, 1, 1)
    assert found.mean == pytest.approx(0.05)
    for values in ([], [0.1, np.nan], [[0.1]]):
        with pytest.raises(ValueError, match="finite"):
            paired_statistics(values)
