"""Reciprocal learning: a teacher that learns whether its pseudo-labels helped the student."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from nnssl.losses.labels import resized_labels
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.modules import parameters_of
from nnssl.trainers.engine.requirements import check_value, check_weights
from nnssl.trainers.engine.step import Step
from nnssl.trainers.registry import register

_ONLY_WITH_DICE = "the default, unless teacher_loss=dice_ce: the cross entropy alone is not weighted"


@register
class ReciprocalLearning(SemiSupervisedTrainer):
    """Reciprocal learning (Zeng et al., MICCAI 2021, doi:10.1007/978-3-030-87196-3_33; Medical Physics 50(1), 2023,
    doi:10.1002/mp.15923).

    Teacher T and student S are two networks that share nothing. In the first half of the steps the teacher learns from
    the labels (eq. 1). Then, in each step (eq. 5, 6, 11, 12)::

        y_u = most likely classes of T(x_u)
        g_u = grad_S CE(S(x_u), y_u),   S moves along -g_u
        g_l = grad_S CE(S(x_l), y_l) after this move, measured only
        h   = eta <g_u, g_l>,   eta: learning rate of the student
        T moves along -grad_T (h CE(T(x_u), y_u) + supervised_weight CE(T(x_l), y_l))

    h is, to first order, by how much a plain gradient step lowers the labeled loss of the student: pseudo-labels that
    helped are confirmed, others are weakened. The student, which learns from pseudo-labels alone, predicts. It is
    random until the second half begins: online validation and ``checkpoint_best.pth`` mean nothing before.

    As in the released code, labels are the most likely classes (the paper samples), the student starts at random
    (``student_start=teacher``: from the teacher's weights), and h is made of plain gradients, neither clipped nor
    normalized (``feedback_limit`` clips h). h is 0 where it is not finite, which happens in fp16 only; curves show its
    mean as ``h``. Losses of CE are those over all heads of deep supervision, with nnU-Net's weights.

    Deviations: nnU-Net's learning rate schedule, once per phase. Short trainings (``recipe``) move both networks by
    AdamW, as the released code for the pancreas does by Adam, with the weight decay of SGD; h stays made of plain
    gradients. SGD (``recipe=nnunet``) has the published momentum 0.9 without Nesterov and weight decay 1e-4, since the
    average of a hundred steps that momentum 0.99 makes is not the move that h describes. ``teacher_loss=dice_ce`` adds
    nnU-Net's Dice to what the teacher learns from labels. Pretrained weights go into both networks.
    """

    source = "Zeng et al., MICCAI 2021, doi:10.1007/978-3-030-87196-3_33"
    year = 2021
    status = "official code"
    trained_networks = 2
    memory_factor = 1.9
    plain_supervision = False
    learns_by_dice = False
    pretrains_student = False
    restarts_schedule = True
    pretrain_share = 0.5
    momentum = 0.9
    nesterov = False
    weight_decay = 1e-4

    supervised_weight: float = 1.0
    student_start: Literal["random", "teacher"] = "random"
    feedback_limit: float | None = None
    teacher_loss: Literal["ce", "dice_ce"] = "ce"

    teacher: nn.Module

    def check_settings(self) -> None:
        super().check_settings()
        check_weights(self, "supervised_weight")
        check_value(self, "feedback_limit", self.feedback_limit is None or self.feedback_limit > 0, "None or above 0")
        of_ce = self.teacher_loss == "ce"
        check_value(self, "segmentation_dice_weight", self.segmentation_dice_weight == 1 or not of_ce, _ONLY_WITH_DICE)
        check_value(self, "rare_class_power", self.rare_class_power == 0 or not of_ce, _ONLY_WITH_DICE)

    def build_modules(self) -> dict[str, nn.Module]:
        return {"teacher": self.new_pretrained_network()}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        # never steps, but lets the grad scaler treat the measured gradients of the student as those of a step
        self.measurement = torch.optim.SGD(self.network.parameters())
        return {"teacher": self.new_optimizer(self.teacher.parameters())}

    def start_main_phase(self) -> None:
        if self.student_start == "teacher":
            unwrap(self.network).load_state_dict(self.teacher.state_dict())

    def supervised_loss(self, step: Step) -> torch.Tensor:
        """What the teacher learns from the labels."""
        heads = self.heads(self.teacher, step.labeled)
        if self.teacher_loss == "dice_ce":
            return self.segmentation_loss(heads, step.target)
        return self.over_heads(self.cross_entropy, heads, step.target)

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        """What the student learns from the labels of the teacher, which stays with its graph in ``step.extra``."""
        heads = self.heads(self.teacher, step.unlabeled)
        labels = resized_labels(self.hard_labels(heads[0]), [head.shape[2:] for head in heads])
        step.extra |= {"teacher_heads": heads, "pseudo_labels": labels}
        return {"pseudo": self.over_heads(self.cross_entropy, self.heads(self.network, step.unlabeled), labels)}

    def optimize(self, step: Step) -> dict[str, torch.Tensor]:
        teacher = self._optimizers["teacher"]
        teacher.zero_grad(set_to_none=True)
        if self.pretraining:
            supervised = self.supervised_loss(step)
            self.backward_and_update(supervised, teacher)
            return {"loss": supervised, "supervised": supervised}
        losses = self.unsupervised_loss(step)
        h = self.move_student(step, losses["pseudo"])
        own = self.over_heads(self.cross_entropy, step.extra["teacher_heads"], step.extra["pseudo_labels"])
        losses |= {"supervised": self.supervised_weight * self.supervised_loss(step), "feedback": h * own}
        self.backward_and_update(losses["supervised"] + losses["feedback"], teacher)
        return {"loss": torch.stack(list(losses.values())).sum(), **losses, "h": h}

    def move_student(self, step: Step, loss: torch.Tensor) -> torch.Tensor:
        """One step of the student; returns h, by how much the labeled loss falls for it (scalar on the device)."""
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(loss, self.optimizer)
        moving = [gradient.clone() for gradient in self.student_gradients()]
        self.update(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        student = self.heads(self.network, step.labeled)
        self.backward(self.over_heads(self.cross_entropy, student, step.target), self.measurement)
        products = [(a * b).sum(dtype=torch.float32) for a, b in zip(moving, self.student_gradients(), strict=True)]
        self.optimizer.zero_grad(set_to_none=True)
        h = rate * torch.stack(products).sum()
        h = torch.where(h.isfinite(), h, 0.0)
        return h if self.feedback_limit is None else h.clamp(-self.feedback_limit, self.feedback_limit)

    def student_gradients(self) -> list[torch.Tensor]:
        """Of all parameters that have one, which those of heads without a loss have not."""
        return [p.grad for p in parameters_of(self.optimizer) if p.grad is not None]
