from __future__ import annotations

import pytest

from nnssl.evaluation.runs import open_runs
from nnssl.report.results import ReportOptions, Results, gather_results, share_of_gap
from tests.evaluation.summaries import write_summary

INVENTED = -1.0
CASES = [f"case_{number:02}" for number in range(20)]
# class b is in the references of the first 8 cases
PRESENT = CASES[:8]


def gathered(folder, **scores) -> Results:
    for name, own in scores.items():
        write_summary(folder / name, own)
    return gather_results(open_runs([f"{name}={folder / name}" for name in scores]), ReportOptions(ceiling="Full"))


def two_classes(dice: float, elsewhere: float | None = None) -> dict[str, list[float | None]]:
    return {case: [dice + 0.001 * n, dice if case in PRESENT else elsewhere] for n, case in enumerate(CASES)}


def test_an_invented_class_closes_no_gap(tmp_path):
    results = gathered(tmp_path, Base=two_classes(0.6), Inv=two_classes(0.7, INVENTED), Full=two_classes(0.8))
    assert results.comparison is not None
    overall = {row.first: row.statistics.mean for row in results.comparison.rows if row.metric == "Dice"
               and row.class_name == "foreground mean"}  # fmt: skip
    assert overall["Inv"] < 0
    share, interval = share_of_gap(results, "Inv", "Full") or pytest.fail("there is a gap")
    assert share == pytest.approx(overall["Inv"] / overall["Full"])
    assert interval is not None
    assert interval[1] < 0


def test_without_inventions_the_share_is_that_of_the_means(tmp_path):
    results = gathered(tmp_path, Base=two_classes(0.6), Half=two_classes(0.7), Full=two_classes(0.8))
    assert share_of_gap(results, "Half", "Full") == (pytest.approx(0.5), pytest.approx((0.5, 0.5)))
    for name in ("Base", "Full"):
        assert share_of_gap(results, name, "Full") is None


def test_a_case_that_only_one_method_has_a_class_in_is_no_gap(tmp_path):
    """The class is in no reference of half of the cases: 0 between baseline and ceiling, -1 for the inventor."""

    def scores(dice: float, elsewhere: float | None) -> dict[str, list[float | None]]:
        return {case: [dice if n % 2 else elsewhere] for n, case in enumerate(CASES)}

    results = gathered(tmp_path, Base=scores(0.6, None), Inv=scores(0.7, INVENTED), Full=scores(0.8, None))
    share, _ = share_of_gap(results, "Inv", "Full") or pytest.fail("there is a gap")
    assert share == pytest.approx((0.1 - 1) / 0.2)


def test_no_gap(tmp_path):
    results = gathered(tmp_path, Base=two_classes(0.8), Half=two_classes(0.7), Full=two_classes(0.6))
    assert share_of_gap(results, "Half", "Full") is None
