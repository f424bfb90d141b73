"""Mean teacher: consistency with an average of past students."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from nnssl.losses.consistency import mean_squared_difference
from nnssl.losses.schedules import ema_decay_with_warmup, sigmoid_rampup
from nnssl.networks.ema import EMATeacher
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.base import SemiSupervisedTrainer, Status
from nnssl.trainers.engine.requirements import check_value, check_weights
from nnssl.trainers.engine.step import Step
from nnssl.trainers.registry import register


@register
class MeanTeacher(SemiSupervisedTrainer):
    """Mean teacher (Tarvainen & Valpola, NIPS 2017, arXiv:1703.01780) for segmentation.

    The teacher is an exponential moving average of the student (their equation for theta'). On unlabeled patches the
    student's probabilities are drawn to those of the teacher, which sees the same patch with other noise::

        L = L_nnU-Net(labeled) + w(p) * mean((S(x_u) - T(x_u + eps))^2),   eps = clip(N(0, 0.1^2), -0.2, 0.2)
        w(p) = consistency_weight * exp(-5 (1 - p)^2),   p = share of the main phase that is done
        teacher <- a * teacher + (1 - a) * student,   a = min(1 - 1 / (t + 1), ema_decay),   t: step of the run

    Weight, decay and noise are those of the 3D medical form (UA-MT, MICCAI 2019, and SSL4MIS), in which the ramp ends
    with the training. Deviations: nnU-Net's Dice + cross entropy with deep supervision replaces the plain sum of
    both; no dropout (nnU-Net has none), so noise alone perturbs. Labeled patches do not enter the consistency, as in
    SSL4MIS (the original includes them). The student predicts, as in the medical comparisons; ``deploy=teacher``
    gives the original paper's choice. ``student_view=strong`` draws the student to the teacher's prediction of a weaker
    view, as later methods do.
    """

    source = "Tarvainen & Valpola, NIPS 2017, arXiv:1703.01780"
    year = 2017
    status: ClassVar[Status] = "official code"
    memory_factor = 2.25

    consistency_weight: float = 0.1
    ema_decay: float = 0.99
    noise_std: float = 0.1
    noise_limit: float = 0.2
    student_view: Literal["weak", "strong"] = "weak"
    """Intensities of unlabeled patches as the student sees them: as the teacher does, or further changed."""
    deploy: Literal["student", "teacher"] = "student"

    teacher: EMATeacher

    def check_settings(self) -> None:
        super().check_settings()
        check_weights(self, "consistency_weight", "noise_std", "noise_limit")
        check_value(self, "ema_decay", 0 <= self.ema_decay < 1, "0 to below 1")

    def build_modules(self) -> dict[str, nn.Module]:
        return {"teacher": self.new_teacher()}

    def prepare_step(self, step: Step) -> None:
        if self.student_view == "strong" and len(step.unlabeled):
            step.extra["weak"] = step.unlabeled
            step.unlabeled = self.strong_view(step.unlabeled)

    def teacher_view(self, step: Step) -> torch.Tensor:
        """The unlabeled patches as the teacher sees them, before noise."""
        return step.extra.get("weak", step.unlabeled)

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        target = self.teacher_probabilities(self.with_noise(self.teacher_view(step)))
        student = self.probabilities(step.unlabeled_logits)
        return {"consistency": self.weight(step) * mean_squared_difference(student, target)}

    def weight(self, step: Step) -> float:
        """Weight of the consistency: w(p)."""
        return self.consistency_weight * sigmoid_rampup(step.progress)

    def teacher_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """The teacher's full-resolution probabilities ``(N, K, *P)``; no gradient."""
        (logits,) = self.heads(self.teacher, images)
        return self.probabilities(logits)

    def with_noise(self, images: torch.Tensor) -> torch.Tensor:
        """``images`` plus clipped Gaussian noise, in units of the normalized intensities."""
        noise = (self.noise_std * self.randn_like(images)).clamp_(-self.noise_limit, self.noise_limit)
        return images + noise

    def after_step(self, step: Step) -> None:
        self.teacher.update(unwrap(self.network), ema_decay_with_warmup(step.iteration, self.ema_decay))

    def deployed_network(self) -> nn.Module:
        return unwrap(self.network) if self.deploy == "student" else self.teacher.network
