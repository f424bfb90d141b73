"""Self-training: a student learns from the whole-volume predictions of the one before."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from nnssl.dataloading.pseudo_labeled import PseudoLabeledCases, PseudoLabels
from nnssl.errors import UserError
from nnssl.losses.schedules import ema_decay_with_warmup
from nnssl.networks.ema import EMATeacher
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.base import SemiSupervisedTrainer, Status
from nnssl.trainers.engine import checkpoint
from nnssl.trainers.engine.loop import FINAL
from nnssl.trainers.engine.pipelines import unlabeled_images
from nnssl.trainers.engine.pseudo_labeling import (
    predict_unlabeled,
    stability_table,
    take_over_masks,
    used_cases,
    write_table,
)
from nnssl.trainers.engine.registered_labels import registered_masks
from nnssl.trainers.engine.restart import forget_past_steps, new_student
from nnssl.trainers.engine.step import Step
from nnssl.trainers.registry import register

REGISTRATION = "registration"


@register
class SelfTraining(SemiSupervisedTrainer):
    """Iterative pseudo-labeling, the recipe that won FLARE22 (Huang et al., MICCAI FLARE 2022).

    Round 0 is `Supervised`, with the same steps. Then, before each further round, nnU-Net's sliding window predicts
    all unlabeled cases, and a new network is trained on labels and pseudo-labels::

        L = L_nnU-Net(labeled) + pseudo_weight * L_nnU-Net(pseudo-labeled)
        u_r(case) = #{y_r != y_(r-1)} / #{y_r > 0},   u = mean of u_1 ... u_r   (their selection script)

    The share ``drop_share`` of the cases with the highest u is left out of the next round (theirs: 76 of 2,000); all
    are predicted again after it. A comparison needs two predictions, so round 1 uses all cases; with ``used_shares``
    those with the highest estimated Dice (as ST++ begins with reliable images; Yang et al., CVPR 2022). Labeled and
    pseudo-labeled patches go through one forward pass and the same augmentation, foreground oversampling included.

    The steps of the run are those of all rounds together, so that tables under equal steps are honest; ``round_shares``
    says how the rounds share them (equally if empty; no more rounds than steps). Predicting comes on top. Each round
    begins with new weights, an optimizer without past and the full learning rate; ``warm_start`` keeps the weights, and
    ``one_schedule`` with it optimizer and learning rate as well: one training, whose pseudo-labels are renewed now and
    then. With ``ema_decay`` an average of past students makes them, as noise of a high learning rate asks for; what is
    deployed is the student of the last step.

    ``initial_pseudo_labels`` names a folder with masks of unlabeled cases: round 0 then learns from them, too, and may
    be the only one. With ``registration`` in its place they are made, as ``nnssl_atlas_predict`` does, by registration
    of the fold's labeled cases to each unlabeled one; trainings on the same labeled cases share them.

    ``round_R/`` in the run folder holds the network that predicted after round R, its pseudo-labels in preprocessed
    space, and ``stability.csv``: which of them round R + 1 uses, why not the others, and how good each is by the
    network's own probabilities (``estimated_dice``). A run that is stopped or killed goes on with ``--c`` at its last
    checkpoint, or at the first case that is not predicted; nothing predicted is done again.

    Deviations: one network and plan for all rounds (they: a large one, an ensemble of five at first, for pseudo-labels
    and a small one to deploy); they drop cases before the last training only, of four; labeled and unlabeled patches
    in the numbers of the plan (they: all cases alike in one pool).
    """

    source = "Huang et al., MICCAI FLARE 2022, doi:10.1007/978-3-031-23911-3_16"
    year = 2022
    status: ClassVar[Status] = "official code"
    memory_factor = 2.0

    rounds: int = 3
    round_shares: tuple[float, ...] = ()
    """Of all steps, one per round, in proportion."""
    drop_share: float = 0.038
    used_shares: tuple[float, ...] = ()
    """Of the cases, those of the highest estimated Dice, in the rounds after the first; the last share stays. All if
    empty."""
    mirrored_pseudo_labels: bool = True
    """Whether pseudo-labels are means over mirrored inputs, as nnU-Net predicts; an axis takes up to twice the time."""
    pseudo_weight: float = 1.0
    warm_start: bool = False
    one_schedule: bool = False
    """Needs ``warm_start``."""
    ema_decay: float = 0.0
    """Of the average of past students that makes the pseudo-labels; 0 for the student itself."""
    initial_pseudo_labels: str = ""
    """Folder with masks for round 0, named as the unlabeled cases; those without one wait for round 1. Or
    ``registration``, which makes them of the labeled cases."""
    registered_cases: int = 0
    """With ``registration``, how many unlabeled cases, drawn by their names, get such a mask; 0 for all."""

    teacher: EMATeacher
    _between_rounds = False

    def check_settings(self) -> None:
        requirements = {
            "rounds must be at least 2, the first on labels only, or 1 with initial_pseudo_labels": (
                self.rounds >= (1 if self.initial_pseudo_labels else 2)
            ),
            "round_shares needs a positive share for each round": (
                (len(self.round_shares) in (0, self.rounds) or self.rounds == 1)
                and all(share > 0 for share in self.round_shares)
            ),
            "registered_cases must be 0, or above 0 with initial_pseudo_labels=registration": (
                self.registered_cases == 0 or (self.registered_cases > 0 and self.initial_pseudo_labels == REGISTRATION)
            ),
            "ema_decay must be 0 with a single round, which makes no pseudo-labels": self.rounds > 1
            or not self.ema_decay,
            "used_shares must have a share per round after the first, or fewer": len(self.used_shares) < self.rounds,
            "drop_share must be at least 0 and below 1": 0 <= self.drop_share < 1,
            "one_schedule must be False without warm_start": self.warm_start or not self.one_schedule,
            "ema_decay must be at least 0 and below 1": 0 <= self.ema_decay < 1,
            "used_shares must be above 0 and at most 1": all(0 < share <= 1 for share in self.used_shares),
            "pseudo_weight must be above 0": 0 < self.pseudo_weight < math.inf,
            "pretrain_share must be 0, since round 0 is that phase: set round_shares": self.pretrain_share == 0,
        }
        for requirement, met in requirements.items():
            if not met:
                found = getattr(self, requirement.split()[0])
                raise UserError(f"SelfTraining: {requirement}", found=found)

    @property
    def phase_starts(self) -> tuple[int, ...]:
        """First steps of the rounds after round 0."""
        total = self.planned_steps
        shares = self.round_shares or (1.0,) * self.rounds
        rounds = min(self.rounds, total)
        starts = [0]
        for number in range(1, rounds):
            start = round(total * sum(shares[:number]) / sum(shares))
            starts.append(min(max(start, starts[-1] + 1), total - rounds + number))
        return tuple(starts[1:])

    @property
    def mirrors_between_phases(self) -> bool:
        return self.mirrored_pseudo_labels

    @property
    def schedule_starts(self) -> tuple[int, ...]:
        return () if self.one_schedule else self.phase_starts

    def build_modules(self) -> dict[str, nn.Module]:
        return {"teacher": self.new_teacher()} if self.ema_decay else {}

    def after_step(self, step: Step) -> None:
        if self.ema_decay:
            begins = [0] if self.warm_start else [0, *self.phase_starts]
            age = step.iteration - max(begin for begin in begins if begin <= step.iteration)
            self.teacher.update(unwrap(self.network), ema_decay_with_warmup(age, self.ema_decay))

    def deployed_network(self) -> nn.Module:
        return self.teacher.network if self.ema_decay and self._between_rounds else unwrap(self.network)

    @property
    def current_round(self) -> int:
        """Round of the next step, from 0 on."""
        return sum(start <= self.iteration for start in self.phase_starts)

    def round_folder(self, number: int) -> Path:
        """What round ``number`` leaves behind."""
        return Path(self.output_folder, f"round_{number}")

    def pseudo_labels(self, number: int) -> PseudoLabels:
        """Predictions of the network after round ``number``."""
        return PseudoLabels(self.round_folder(number) / "pseudo_labels")

    @property
    def given_pseudo_labels(self) -> PseudoLabels:
        """What the training was given for round 0, on the grids of the preprocessed images."""
        return PseudoLabels(Path(self.output_folder, "initial_pseudo_labels"))

    def stability_file(self, number: int) -> Path:
        """Table of the pseudo-labels of round ``number``."""
        return self.round_folder(number) / "stability.csv"

    def unlabeled_cases(self) -> PseudoLabeledCases | None:
        if self.current_round == 0 and self.initial_pseudo_labels:
            cases = self.ranks.from_main(self._take_over, timeout=None)
            return PseudoLabeledCases(unlabeled_images(self), self.given_pseudo_labels, cases)
        table = self.stability_file(self.current_round - 1)
        if self.current_round == 0 or (self.iteration in self.phase_starts and not table.is_file()):
            return None  # a continued training that has yet to predict them
        return PseudoLabeledCases(unlabeled_images(self), self.pseudo_labels(self.current_round - 1), used_cases(table))

    def _take_over(self) -> list[str]:
        source, cases = Path(self.initial_pseudo_labels), self.split().unlabeled
        if self.initial_pseudo_labels == REGISTRATION and self.iteration == 0:
            source, cases = registered_masks(self, self.registered_cases)
        # a training that is continued has them already
        return take_over_masks(self, source, self.given_pseudo_labels, cases)

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        if self.current_round == 0 and not self.initial_pseudo_labels:
            return {}
        return {"pseudo": self.pseudo_weight * self.segmentation_loss(step.unlabeled_heads, step.pseudo_target)}

    def start_phase(self, stopping: Callable[[], bool]) -> bool:
        self._between_rounds = True
        try:
            return self._start_round(stopping)
        finally:
            self._between_rounds = False

    def _start_round(self, stopping: Callable[[], bool]) -> bool:
        ended = self.current_round - 1
        if self.ranks.is_main and not self.disable_checkpointing:
            checkpoint.save(self, self.round_folder(ended) / FINAL, resumable=False)
        earlier = self.pseudo_labels(ended - 1) if ended else None
        if not predict_unlabeled(self, self.pseudo_labels(ended), earlier, stopping):
            return False
        self.ranks.from_main(lambda: self._select(ended))
        if not self.warm_start:
            new_student(self, self.current_round)
        if not self.one_schedule:
            forget_past_steps(self)
        return True

    def _select(self, ended: int) -> None:
        predictions = [self.pseudo_labels(number) for number in range(ended + 1)]
        share = self.used_shares[: ended + 1][-1] if self.used_shares else 1.0
        rows = stability_table(predictions, self.split().unlabeled, self.drop_share, share)
        write_table(rows, self.stability_file(ended))
        used = sum(row["used"] == "yes" for row in rows)
        self.print_to_log_file(
            f"Round {ended + 1} trains on {len(self.split().train)} labeled and {used} pseudo-labeled cases; "
            f"{len(rows) - used} left out, see {self.stability_file(ended)}"
        )

    def on_train_start(self) -> None:
        if self.iteration == 0 and self.ranks.is_main:
            shutil.rmtree(self.given_pseudo_labels.folder, ignore_errors=True)
        super().on_train_start()
        if self.iteration == 0 and self.ranks.is_main:
            # of a run that is overwritten: its pseudo-labels would be taken for those of this one
            for folder in Path(self.output_folder).glob("round_*"):
                shutil.rmtree(folder)
