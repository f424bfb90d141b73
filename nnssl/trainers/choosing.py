"""Which method ``nnssl_train DATASET auto FOLD`` trains, and why.

The rules are a table, read from above; the first that holds decides. What each rests on is measured, and stands in
docs/choosing.md with its figures; where nothing has been measured, the rule says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FEW_LABELED = 40
"""Labeled cases up to which measured gains of the methods are relied on."""
FEWEST_UNLABELED = 8
FEWEST_STEPS = 1_000
"""Steps below which the rounds of self-training are too short to be finished."""

_SWITCH = {"atlas_augmentation": "regional_switch"}


@dataclass(frozen=True)
class Situation:
    """What is known before a training.

    Attributes:
        labeled: number of labeled cases of the data set.
        unlabeled: number of its unlabeled cases.
        common_place: whether classes of different labeled cases lie at corresponding places, as planning measured;
            None if it could not be measured.
        steps: of the training.
    """

    labeled: int
    unlabeled: int
    common_place: bool | None
    steps: int


@dataclass(frozen=True)
class Rule:
    """A row of the table: ``when`` in words, whether it holds, the method, and what that rests on."""

    when: str
    holds: Callable[[Situation], bool]
    trainer: str
    overrides: dict[str, Any]
    because: str


@dataclass(frozen=True)
class Choice:
    """A method with its hyper-parameters, and the reasons in sentences."""

    trainer: str
    overrides: dict[str, Any]
    reasons: tuple[str, ...]


RULES = (
    Rule(
        "a single labeled case",
        lambda s: s.labeled < 2,
        "Supervised",
        {},
        "regions need two labeled cases to be exchanged, and no other method has shown a gain over Supervised at equal "
        "minutes",
    ),
    Rule(
        f"more than {FEW_LABELED} labeled cases",
        lambda s: s.labeled > FEW_LABELED,
        "Supervised",
        {},
        "gains have been measured with few labels only",
    ),
    Rule(
        "classes without a common place in the labeled cases",
        lambda s: not s.common_place,
        "Supervised",
        {},
        "exchanging regions needs corresponding places, and no other method has shown a gain over Supervised at equal "
        "minutes",
    ),
    Rule(
        f"fewer than {FEWEST_UNLABELED} unlabeled cases",
        lambda s: s.unlabeled < FEWEST_UNLABELED,
        "Supervised",
        _SWITCH,
        "labeled cases that exchange regions gain most where labels are few; so few unlabeled ones have not been shown "
        "to add to that",
    ),
    Rule(
        f"fewer than {FEWEST_STEPS:,} steps",
        lambda s: s.steps < FEWEST_STEPS,
        "Supervised",
        _SWITCH,
        "labeled cases that exchange regions gain most where labels are few; pseudo-labels of an unfinished network do "
        "not help",
    ),
    Rule(
        "few labels, unlabeled cases, corresponding places",
        lambda s: True,
        "SwitchedSelfTraining",
        {},
        "labeled cases that exchange regions with each other, then with pseudo-labeled ones, gain most at equal "
        "minutes",
    ),
)


def choose(situation: Situation) -> Choice:
    """The first rule that holds, with what is known in words."""
    rule = next(rule for rule in RULES if rule.holds(situation))
    places = {True: "at corresponding places", False: "without a common place", None: "of unknown places"}
    known = (
        f"{situation.labeled} labeled and {situation.unlabeled} unlabeled cases, classes "
        f"{places[situation.common_place]}, {situation.steps:,} steps"
    )
    reasons = [known, f"{rule.when}: {rule.because}"]
    if rule.trainer == "Supervised" and situation.unlabeled:
        reasons.append(f"the {situation.unlabeled} unlabeled cases are not used")
    return Choice(rule.trainer, dict(rule.overrides), tuple(reasons))
