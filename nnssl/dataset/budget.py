"""Label budgets: which few cases of a fully labeled source stay labeled, validate, test or become unlabeled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nnssl.dataset.groups import group_cases, name_some, refuse_repeated
from nnssl.dataset.source import Source
from nnssl.dataset.splits import without_groups_of
from nnssl.errors import UserError

# the test cases are drawn with nnU-Net's seed, whatever --seed: figures of different draws stay comparable
TEST_SEED = 12345


@dataclass(frozen=True)
class Budget:
    """Which case plays which part, each list sorted."""

    labeled: list[str]
    validation: list[str]
    unlabeled: list[str]
    test: list[str]

    def summary(self) -> str:
        """How many cases of each kind; with groups there can be more labeled cases than were asked for."""
        counts = [f"{len(self.labeled)} labeled", f"{len(self.unlabeled)} unlabeled", f"{len(self.test)} test"]
        if self.validation:
            counts.insert(1, f"{len(self.validation)} validation")
        return ", ".join(counts) + " cases"


def draw_budget(
    pool: Sequence[str],
    *,
    labeled: int | None = None,
    labeled_cases: Sequence[str] = (),
    validation: int = 0,
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> Budget:
    """Draws labeled and validation cases from the pool; the rest is unlabeled.

    The pool is shuffled once per seed. Labeled cases are taken from its front, so the set of a smaller budget is part
    of that of a larger one; validation cases are taken from its end, so they are the same for every budget. With
    ``groups`` whole groups are taken until there are at least as many cases as asked for.

    Instead of a number, ``labeled_cases`` names the labeled cases (or groups). ``UserError`` if the pool is too small,
    a name is unknown or only a part of a group is named.
    """
    units = group_cases(pool, groups)
    # RandomState, not default_rng: its numbers are frozen for good, and with them the draws of published figures
    order = np.random.RandomState(seed).permutation(len(units))
    shuffled = [units[index] for index in order]
    chosen = _named_units(units, labeled_cases, groups) if labeled_cases else _take(shuffled, labeled or 0)
    left = _without(shuffled, chosen)
    held_out = _take(left[::-1], validation)
    found = len(_flat(chosen)), len(_flat(held_out))
    if not found[0] or found[0] < (labeled or 0) or found[1] < validation:
        raise UserError(
            "the pool has too few cases",
            expected=f"{labeled or len(labeled_cases)} labeled (at least 1) and {validation} validation cases",
            found=f"{len(pool)} cases to draw from",
        )
    rest = _without(left, held_out)
    return Budget(_flat(chosen), _flat(held_out), _flat(rest), [])


def draw_test(pool: Sequence[str], number: int, groups: Mapping[str, str] | None = None) -> list[str]:
    """Draws test cases (whole groups, at least ``number`` cases), the same for every seed of the labeled draw."""
    units = group_cases(pool, groups)
    order = np.random.RandomState(TEST_SEED).permutation(len(units))
    test = _flat(_take([units[index] for index in order], number))
    if len(test) < number:
        raise UserError("fewer cases than test cases asked for", expected=number, found=len(pool))
    return test


def draw_unlabeled(
    pool: Sequence[str], number: int, seed: int = 0, groups: Mapping[str, str] | None = None
) -> list[str]:
    """Draws cases (whole groups, at least ``number`` cases) to stay unlabeled; smaller numbers are part of larger ones.

    ``UserError`` if the pool has fewer.
    """
    if number > len(pool):
        raise UserError("fewer cases than unlabeled cases asked for", expected=number, found=len(pool))
    units = group_cases(pool, groups)
    # an order of its own, else they would be neighbors of the labeled ones in that of the labeled draw
    order = np.random.RandomState([seed, TEST_SEED]).permutation(len(units))
    return _flat(_take([units[index] for index in order], number))


def plan_budget(
    source: Source,
    *,
    labeled: int | None = None,
    labeled_cases: Sequence[str] = (),
    unlabeled: int | None = None,
    validation: int = 0,
    test: int = 0,
    test_cases: Sequence[str] = (),
    seed: int = 0,
    groups: Mapping[str, str] | None = None,
) -> Budget:
    """Decides the part of every case of the source, without writing anything.

    Test cases are those of the source; if it has none with labels, ``test`` of them can be drawn from the pool or
    ``test_cases`` named. With ``unlabeled`` that many of the other cases are kept, and the rest plays no part.
    ``UserError`` if a group would be in the pool and in the test part, or if a name is given twice.
    """
    refuse_repeated("--labeled-cases", labeled_cases)
    refuse_repeated("--test-cases", test_cases)
    pool, test_part = list(source.pool), list(source.test)
    if test or test_cases:
        if any(case in source.labels for case in source.test):
            raise UserError(
                "the source has its own test cases",
                where=source.location,
                found=f"{len(source.test)} test cases",
                fix="leave out --test and --test-cases",
            )
        unknown = sorted(set(test_cases) - set(pool))
        if unknown:
            raise UserError("test cases that the source does not have", found=name_some(unknown))
        test_part = sorted(test_cases) if test_cases else draw_test(pool, test, groups)
        pool = [case for case in pool if case not in set(test_part)]
    training = [*pool, *source.unlabeled]
    straddling = sorted(set(training) - set(without_groups_of(test_part, training, groups)))
    if straddling:
        raise UserError(
            "cases of one group are in the training pool and in the test part",
            where=source.location,
            found=name_some(straddling),
            fix="move them to one side",
        )
    drawn = draw_budget(
        pool, labeled=labeled, labeled_cases=labeled_cases, validation=validation, seed=seed, groups=groups
    )
    others = sorted([*drawn.unlabeled, *source.unlabeled])
    if unlabeled is not None:
        others = draw_unlabeled(others, unlabeled, seed, groups)
    return Budget(drawn.labeled, drawn.validation, others, test_part)


def _take(units: Sequence[list[str]], number: int) -> list[list[str]]:
    """Units from the front until they hold at least ``number`` cases."""
    taken: list[list[str]] = []
    while sum(map(len, taken)) < number and len(taken) < len(units):
        taken.append(units[len(taken)])
    return taken


def _named_units(units: Sequence[list[str]], names: Sequence[str], groups: Mapping[str, str] | None) -> list[list[str]]:
    cases = {case for unit in units for case in unit}
    group_names = {groups[case] for case in cases if case in groups} if groups else set()
    unknown = [name for name in names if name not in cases and name not in group_names]
    if unknown:
        raise UserError("labeled cases that cannot be drawn: not in the training pool", found=name_some(unknown))
    wanted = {case for case in cases if case in names or (groups and groups.get(case) in names)}
    chosen = [unit for unit in units if wanted & set(unit)]
    partial = sorted(case for unit in chosen for case in unit if case not in wanted)
    if partial:
        raise UserError(
            "a group would be partly labeled and partly unlabeled",
            found=f"not named: {name_some(partial)}",
            fix="name all cases of the group, or the group",
        )
    return chosen


def _flat(units: Sequence[list[str]]) -> list[str]:
    return sorted(case for unit in units for case in unit)


def _without(units: Sequence[list[str]], taken: Sequence[list[str]]) -> list[list[str]]:
    names = {unit[0] for unit in taken}
    return [unit for unit in units if unit[0] not in names]
