from __future__ import annotations

from pathlib import Path

import pytest

from nnssl.dataset.budget import Budget, draw_budget, draw_test, draw_unlabeled, plan_budget
from nnssl.dataset.source import Source
from nnssl.errors import UserError

POOL = [f"case_{index:02d}" for index in range(20)]
GROUPS = {case: f"patient_{index // 3}" for index, case in enumerate(POOL)}


def source(pool=POOL, test=(), unlabeled=(), test_labels=True) -> Source:
    labels = {case: f"labels/{case}" for case in [*pool, *(test if test_labels else ())]}
    images = {case: [f"images/{case}"] for case in [*pool, *test, *unlabeled]}
    return Source(Path("source"), {}, images, labels, list(pool), list(test), list(unlabeled), object)


@pytest.mark.parametrize("groups", [None, GROUPS])
@pytest.mark.parametrize("seed", range(8))
def test_smaller_budgets_are_part_of_larger_ones(seed, groups):
    previous: set[str] = set()
    for labeled in range(1, 15):
        budget = draw_budget(POOL[::-1], labeled=labeled, validation=3, seed=seed, groups=groups)
        assert previous <= set(budget.labeled)
        previous = set(budget.labeled)
        assert sorted([*budget.labeled, *budget.validation, *budget.unlabeled]) == POOL
        # the validation cases do not depend on the budget
        assert budget.validation == draw_budget(POOL, labeled=1, validation=3, seed=seed, groups=groups).validation
        if groups is None:
            assert (len(budget.labeled), len(budget.validation)) == (labeled, 3)


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_taken_whole(seed):
    budget = draw_budget(POOL, labeled=4, validation=2, seed=seed, groups=GROUPS)
    parts = [{GROUPS[case] for case in part} for part in (budget.labeled, budget.validation, budget.unlabeled)]
    assert sum(map(len, parts)) == len(set(GROUPS.values()))
    assert 4 <= len(budget.labeled) <= 6
    assert 2 <= len(budget.validation) <= 3


def test_draws_are_frozen():
    """Published figures name a seed: the same seed must give the same cases in every release."""
    assert draw_budget(POOL, labeled=4, seed=0).labeled == ["case_01", "case_08", "case_18", "case_19"]
    assert draw_test(POOL, 4) == ["case_03", "case_08", "case_13", "case_16"]
    assert draw_budget(POOL, labeled=4, seed=1).labeled != draw_budget(POOL, labeled=4, seed=0).labeled


def test_named_cases():
    budget = draw_budget(POOL, labeled_cases=["case_03", "case_01"], validation=2)
    assert budget.labeled == ["case_01", "case_03"]
    assert not set(budget.validation) & set(budget.labeled)
    by_group = draw_budget(POOL, labeled_cases=["patient_1", "case_18", "case_19"], groups=GROUPS)
    assert by_group.labeled == ["case_03", "case_04", "case_05", "case_18", "case_19"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labeled": 0}, "too few cases"),
        ({"labeled": 21}, "too few cases"),
        ({"labeled": 18, "validation": 3}, "too few cases"),
        ({"labeled_cases": ["ghost"]}, "ghost"),
        ({"labeled_cases": ["patient_1"]}, "patient_1"),
        ({"labeled_cases": ["case_03", "case_04"], "groups": GROUPS}, "not named: case_05"),
    ],
)
def test_impossible_draws(options, message):
    with pytest.raises(UserError, match=message):
        draw_budget(POOL, **options)


def test_whole_pool_labeled():
    assert draw_budget(POOL, labeled=20) == Budget(POOL, [], [], [])


def test_test_cases_do_not_depend_on_the_seed_of_the_labeled_draw():
    plans = [plan_budget(source(), labeled=4, test=5, seed=seed) for seed in range(4)]
    assert all(plan.test == draw_test(POOL, 5) for plan in plans)
    assert len({tuple(plan.labeled) for plan in plans}) > 1
    for plan in plans:
        assert sorted([*plan.labeled, *plan.unlabeled, *plan.test]) == POOL
    drawn = draw_test(POOL, 5, GROUPS)
    assert 5 <= len(drawn) <= 7
    assert drawn == [case for case in POOL if GROUPS[case] in {GROUPS[test] for test in drawn}]
    with pytest.raises(UserError, match="fewer cases"):
        draw_test(POOL, 21)


def test_parts_of_the_source():
    plan = plan_budget(source(test=["t1", "t2"], unlabeled=["a_unlabeled"]), labeled=4)
    assert plan.test == ["t1", "t2"]
    assert len(plan.unlabeled) == 17
    assert plan.unlabeled[0] == "a_unlabeled"
    assert plan.summary() == "4 labeled, 17 unlabeled, 2 test cases"
    named = plan_budget(source(), labeled=2, validation=1, test_cases=["case_09", "case_02"])
    assert named.test == ["case_02", "case_09"]
    assert named.summary() == "2 labeled, 1 validation, 15 unlabeled, 2 test cases"


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_fewer_unlabeled_cases_are_part_of_more(groups):
    whole = plan_budget(source(unlabeled=["u1", "u2"]), labeled=4, validation=2, seed=3, groups=groups)
    previous: set[str] = set()
    for number in range(len(whole.unlabeled) + 1):
        plan = plan_budget(
            source(unlabeled=["u1", "u2"]), labeled=4, unlabeled=number, validation=2, seed=3, groups=groups
        )
        assert (plan.labeled, plan.validation) == (whole.labeled, whole.validation)
        assert previous <= set(plan.unlabeled) <= set(whole.unlabeled)
        if groups is None:
            assert len(plan.unlabeled) == number
        else:
            left_out = set(whole.unlabeled) - set(plan.unlabeled)
            assert not {groups.get(case, case) for case in plan.unlabeled} & {
                groups.get(case, case) for case in left_out
            }
            assert number <= len(plan.unlabeled) <= number + 2
        previous = set(plan.unlabeled)
    assert previous == set(whole.unlabeled)
    # further cases, but not those next to the labeled ones in the order of the labeled draw
    assert draw_unlabeled(POOL, 4) != draw_budget(POOL, labeled=4).labeled
    with pytest.raises(UserError, match="fewer cases than unlabeled"):
        plan_budget(source(), labeled=4, unlabeled=17)


def test_draws_of_unlabeled_cases_are_frozen():
    assert draw_unlabeled(POOL, 3, seed=0) == ["case_02", "case_11", "case_12"]


def test_test_cases_of_the_source_are_not_replaced():
    with pytest.raises(UserError, match="own test cases"):
        plan_budget(source(test=["t"]), labeled=2, test=3)
    # without labels they cannot be evaluated on, so others may be drawn instead
    assert len(plan_budget(source(test=["t"], test_labels=False), labeled=2, test=3).test) == 3
    with pytest.raises(UserError, match="ghost"):
        plan_budget(source(), labeled=2, test_cases=["ghost"])


@pytest.mark.parametrize(
    "names", [{"labeled": 2, "test_cases": ["case_02", "case_03", "case_02"]}, {"labeled_cases": ["case_02"] * 2}]
)
def test_a_case_named_twice_is_refused(names):
    with pytest.raises(UserError, match="the same name twice in --") as refused:
        plan_budget(source(), **names)
    assert refused.value.found == "case_02"


def test_a_group_in_pool_and_test_is_a_leak():
    with pytest.raises(UserError, match=r"(?s)training pool and in the test part.*case_07"):
        plan_budget(source(test=["t"]), labeled=2, groups={"case_07": "p", "t": "p"})
    with pytest.raises(UserError, match=r"(?s)training pool and in the test part.*u1"):
        plan_budget(source(test=["t"], unlabeled=["u1"]), labeled=2, groups={"u1": "p", "t": "p"})
