"""Which method ``nnssl_train DATASET auto FOLD`` trains, and why.

The rules are a table, read from above; the first that holds decides. What each rests on is measured, and stands in
docs/choosing.md with its figures; where nothing has been measured, the rule says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from nnssl.trainers.registry import get_trainer

MOST_SWITCHED = 4
"""Patients with labels up to which the regional switch is relied on: it was measured with two and four."""
MOST_SWITCHED_2D = 8
"""The same in 2D, measured with eight."""
LONG_STEPS = 10_000
"""Steps from which on nothing has been measured here, and what is published decides."""
MOST_REGISTERED = 3
"""Labeled cases up to which their labels are registered to unlabeled ones: it gained with two, nothing with four."""
ENOUGH_REGISTERED = 64
"""Unlabeled cases that they are registered to at most: 16 did as well as 64 and 158."""
FEW_LABELED = 40
"""Labeled cases up to which a published gain is relied on."""
FEWEST_LABELED = 2
FEWEST_UNLABELED = 8
FEWEST_STEPS_REGISTERED = 400
"""For registered labels: at 400 they gained, at 240 of another data set they lost."""
FEWEST_STEPS_LATE = 1_500
"""For pseudo-labels that are made late in a training: at 1,860 and 2,400 they gained, at 1,280 and fewer nothing."""
FEWEST_STEPS_SWITCHED = 240
"""For the regional switch: the fewest that it was measured at."""
FEWEST_STEPS_SWITCHED_2D = 1_000
"""The same in 2D, where it was measured at 1,300 and more."""


@dataclass(frozen=True)
class Situation:
    """What is known before a training.

    Attributes:
        labeled: number of labeled cases that are trained on.
        patients: of whom they are, by ``groups.json``; without it the number of cases.
        unlabeled: number of unlabeled cases that may be used.
        steps: of the training.
        dimensions: of the patches, 2 or 3.
        cascaded: whether it is a stage of a cascade, whose stages are trained by the same method.
        corresponding: whether they are of several patients, and the classes of these have a place in common.
        registrable: number of unlabeled cases to which there is time to register the labeled ones.
        steps_after_registration: of the training, where that is done in the same minutes.
        steps_after_pseudo_labels: of the training, where the unlabeled cases are predicted once in the same minutes.
    """

    labeled: int
    patients: int
    unlabeled: int
    steps: int
    dimensions: int = 3
    cascaded: bool = False
    corresponding: bool = False
    registrable: int = 0
    steps_after_registration: int = 0
    steps_after_pseudo_labels: int = 0


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


# one training, whose pseudo-labels are made by an average of its networks when two thirds of it are done
LATE = {
    "rounds": 2,
    "round_shares": (2, 1),
    "warm_start": True,
    "one_schedule": True,
    "ema_decay": 0.99,
    "mirrored_pseudo_labels": False,
}

RULES = (
    Rule(
        "a stage of a cascade",
        lambda s: s.cascaded,
        "Supervised",
        {},
        "of the others only SwitchedSupervised trains both stages, which has not been measured there",
    ),
    Rule(
        f"patches in 2D, labels of at most {MOST_SWITCHED_2D} patients, in which classes lie at common places, and "
        f"{FEWEST_STEPS_SWITCHED_2D:,} to {LONG_STEPS:,} steps",
        lambda s: (
            s.dimensions == 2
            and s.patients <= MOST_SWITCHED_2D
            and s.corresponding
            and FEWEST_STEPS_SWITCHED_2D <= s.steps < LONG_STEPS
        ),
        "SwitchedSupervised",
        {},
        "with 8 labeled ultrasound images, in the same minutes, the regional switch gained 0.014 and 0.010 Dice (two "
        "draws of labels)",
    ),
    Rule(
        "other patches in 2D",
        lambda s: s.dimensions == 2,
        "Supervised",
        {},
        "with 8 labeled images, in the same minutes, no method gained on nuclei, which have no common place, nor any "
        "but the regional switch in both draws of labels on ultrasound; nothing longer has been measured",
    ),
    Rule(
        f"fewer than {FEWEST_LABELED} labeled cases",
        lambda s: s.labeled < FEWEST_LABELED,
        "Supervised",
        {},
        "nothing has been measured with a single one",
    ),
    Rule(
        f"more than {FEW_LABELED} labeled cases",
        lambda s: s.labeled > FEW_LABELED,
        "Supervised",
        {},
        "gains have been measured with few labels only",
    ),
    Rule(
        f"at most {MOST_REGISTERED} labeled cases, in which classes lie at common places, time to register them to "
        f"unlabeled ones, and at least {FEWEST_STEPS_REGISTERED} steps",
        lambda s: (
            s.labeled <= MOST_REGISTERED
            and s.corresponding
            and min(s.unlabeled, s.registrable) >= FEWEST_UNLABELED
            and s.steps_after_registration >= FEWEST_STEPS_REGISTERED
        ),
        "SwitchedSelfTraining",
        {"initial_pseudo_labels": "registration", "rounds": 1},
        "with two cases it gained 0.018 and 0.010 Dice on hippocampus at 800 steps (two draws of them), which is 0.010 "
        "and 0.002 more than the regional switch; on brain structures it lost 0.023 at 240",
    ),
    Rule(
        f"labels of at most {MOST_SWITCHED} patients, in which classes lie at common places, {FEWEST_UNLABELED} or "
        f"more unlabeled cases, time to predict these and for {FEWEST_STEPS_LATE:,} steps, and fewer than "
        f"{LONG_STEPS:,} steps",
        lambda s: (
            s.patients <= MOST_SWITCHED
            and s.corresponding
            and s.unlabeled >= FEWEST_UNLABELED
            and s.steps_after_pseudo_labels >= FEWEST_STEPS_LATE
            and s.steps < LONG_STEPS
        ),
        "SwitchedSelfTraining",
        LATE,
        "pseudo-labels that are made late gained 0.008 and 0.007 Dice over the regional switch on hippocampus in the "
        "same 12 minutes (1,860 steps, two draws of labels), 0.014 and 0.040 on ACDC in 2,400 steps; in 570 to 1,280 "
        "steps they were level on test cases",
    ),
    Rule(
        f"labels of at most {MOST_SWITCHED} patients, in which classes lie at common places, at least "
        f"{FEWEST_STEPS_SWITCHED} steps, and fewer than {LONG_STEPS:,} steps or {FEWEST_UNLABELED} unlabeled cases",
        lambda s: (
            s.patients <= MOST_SWITCHED
            and s.corresponding
            and s.steps >= FEWEST_STEPS_SWITCHED
            and (s.steps < LONG_STEPS or s.unlabeled < FEWEST_UNLABELED)
        ),
        "SwitchedSupervised",
        {},
        "in the same minutes the regional switch changed the Dice by +0.040 and -0.005 on ACDC (two draws of labels), "
        "+0.013 and +0.012 on hippocampus, -0.012 and -0.011 on the left atrium, +0.003 and -0.006 on brain structures",
    ),
    Rule(
        f"fewer than {FEWEST_UNLABELED} unlabeled cases",
        lambda s: s.unlabeled < FEWEST_UNLABELED,
        "Supervised",
        {},
        "no gain has been measured with fewer than 13 unlabeled cases",
    ),
    Rule(
        f"fewer than {LONG_STEPS:,} steps",
        lambda s: s.steps < LONG_STEPS,
        "Supervised",
        {},
        "nothing else has been measured to gain in the same minutes, and BCP lost 0.09 at 400 steps",
    ),
    Rule(
        "few labeled cases, unlabeled ones, and a long training",
        lambda s: True,
        "BCP",
        {},
        "at 1,200 steps it gained 0.005 Dice on hippocampus, and its paper far more in a long training",
    ),
)


def choose(situation: Situation) -> Choice:
    """The first rule that holds, with what is known in words."""
    rule = next(rule for rule in RULES if rule.holds(situation))
    patients = f" of {situation.patients} patients" if situation.patients < situation.labeled else ""
    known = (
        f"{situation.labeled} labeled{patients} and {situation.unlabeled} unlabeled cases, {situation.steps:,} steps"
    )
    reasons = [known, f"{rule.when}: {rule.because}"]
    overrides, trainer = dict(rule.overrides), cast(Any, get_trainer(rule.trainer))
    if situation.unlabeled and not trainer.uses_unlabeled:
        reasons.append(f"the {situation.unlabeled} unlabeled cases are not used")
    registered = min(situation.registrable, ENOUGH_REGISTERED)
    if "initial_pseudo_labels" in overrides and registered < situation.unlabeled:
        overrides["registered_cases"] = registered
        reasons.append(
            f"they are registered to {registered} unlabeled cases, "
            + ("which are enough" if registered == ENOUGH_REGISTERED else "for which there is time")
            + "; the others are not used (--set registered_cases=0 takes all)"
        )
    reasons.append("how much this rests on: docs/choosing.md")
    return Choice(rule.trainer, overrides, tuple(reasons))
