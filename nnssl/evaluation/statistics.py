"""Statistics of paired differences: one value per case, the first method minus the second."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
RESAMPLES = 10_000
# below this a difference is the rounding of a mean, not a difference
_ROUNDING = 1e-9


@dataclass(frozen=True)
class PairedStatistics:
    """What the differences of ``n`` cases say.

    Attributes:
        n: number of cases.
        mean: mean difference.
        interval: 95 % interval of the mean (:func:`bootstrap_interval`), None if there is none.
        p_value: of the two-sided Wilcoxon signed-rank test (:func:`signed_rank_p`).
        effect: :func:`rank_biserial`.
        positive, ties, negative: numbers of cases.
    """

    n: int
    mean: float
    interval: tuple[float, float] | None
    p_value: float
    effect: float
    positive: int
    ties: int
    negative: int


def paired_statistics(differences: ArrayLike) -> PairedStatistics:
    """All statistics of the differences (n,), which must be finite; values below 1e-9 count as ties.

    >>> paired_statistics([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).p_value
    0.03125
    """
    values = np.asarray(differences, float)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError("expected at least one difference, and finite ones only")
    values = _without_rounding(values)
    return PairedStatistics(
        n=values.size,
        mean=float(values.mean()),
        interval=bootstrap_interval(values),
        p_value=signed_rank_p(values),
        effect=rank_biserial(values),
        positive=int((values > 0).sum()),
        ties=int((values == 0).sum()),
        negative=int((values < 0).sum()),
    )


def bootstrap_interval(values: ArrayLike) -> tuple[float, float] | None:
    """95 % interval of the mean of the values (n,): bootstrap over the cases, bias corrected and accelerated.

    10,000 samples with a fixed seed (Efron, J Am Stat Assoc 82:171-185, 1987). None for less than three values and for
    equal ones, which do not say how much others would differ.
    """
    from scipy.stats import bootstrap

    array = np.asarray(values, float)
    if array.size < 3 or np.ptp(array) < _ROUNDING:
        return None
    # where all but one value are equal the acceleration may be undefined, which shows as NaN
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bootstrap(
            (array,), np.mean, n_resamples=RESAMPLES, confidence_level=CONFIDENCE, rng=0
        ).confidence_interval
    return (float(found.low), float(found.high)) if np.isfinite([found.low, found.high]).all() else None


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike) -> tuple[float, float] | None:
    """95 % interval of the ratio of the means of two paired samples (n,): bootstrap over the cases, percentiles.

    None for less than three cases, and where the mean of the denominator is not positive in nearly all samples (all
    but 2.5 %): then the ratio has no meaning.
    """
    above, below = np.asarray(numerator, float), np.asarray(denominator, float)
    if above.size < 3:
        return None
    picks = np.random.default_rng(0).integers(0, above.size, (RESAMPLES, above.size))
    bottom = below[picks].mean(1)
    if np.quantile(bottom, (1 - CONFIDENCE) / 2) <= 0:
        return None
    ratios = above[picks].mean(1)[bottom > 0] / bottom[bottom > 0]
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def signed_rank_p(differences: ArrayLike) -> float:
    """p-value of the two-sided Wilcoxon signed-rank test; ties are left out, and 1 if there are only ties."""
    from scipy.stats import wilcoxon

    values = _without_rounding(np.asarray(differences, float))
    values = values[values != 0]
    if not values.size:
        return 1.0
    # equal sizes get equal ranks, although they differ by rounding
    return float(wilcoxon(np.round(values, 9)).pvalue)


def smallest_p(n: int) -> float:
    """Smallest p-value that the two-sided signed-rank test can give for ``n`` cases: all differ in one direction."""
    return min(1.0, 2.0 ** (1 - n))


def rank_biserial(differences: ArrayLike) -> float:
    """Matched-pairs rank-biserial correlation of the differences (n,), from -1 to 1; 0 if all are ties.

    Share of the rank sum that is positive minus the share that is negative (Kerby, Compr Psychol 3:1, 2014).

    >>> rank_biserial([1.0, 2.0, -3.0])
    0.0
    """
    from scipy.stats import rankdata

    values = _without_rounding(np.asarray(differences, float))
    values = values[values != 0]
    if not values.size:
        return 0.0
    ranks = rankdata(np.abs(np.round(values, 9)))
    return float((ranks * np.sign(values)).sum() / ranks.sum())


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scand J Stat 6:65-70, 1979), in the given order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(p_values)
    steps = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected.tolist()


def _without_rounding(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(values) < _ROUNDING, 0.0, values)
