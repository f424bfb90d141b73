"""UA-MT: consistency with a mean teacher where it is certain."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from nnssl.losses.consistency import squared_difference
from nnssl.losses.schedules import sigmoid_rampup
from nnssl.losses.uncertainty import class_entropy, region_entropy
from nnssl.networks.channel_dropout import dropout_factors, make_scalable, scaled_channels
from nnssl.networks.features import FeatureLayer, bottleneck, last_decoder_stage
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.requirements import check_value
from nnssl.trainers.engine.step import Step
from nnssl.trainers.mean_teacher import MeanTeacher
from nnssl.trainers.registry import register


@register
class UAMT(MeanTeacher):
    """Uncertainty-aware mean teacher (Yu et al., MICCAI 2019, arXiv:1907.07034).

    A mean teacher (see `MeanTeacher` for noise eps, weight w and averaging) whose target counts only where its
    predictions under T random perturbations agree in a decided one::

        pbar = 1/T sum_t T_t(x_u + eps_t),   H = -sum_c pbar_c ln pbar_c
        m = [H < h(p)],   h(p) = (0.75 + 0.25 exp(-5 (1 - p)^2)) ln K
        L = L_nnU-Net(labeled) + w(p) * sum(m (S(x_u) - T(x_u + eps))^2) / (K sum m)

    The target T(x_u + eps) is a pass of its own, so that a step costs T + 1 passes of the teacher without gradient.
    Passes are made one after the other: their memory does not grow with T. With region-based labels H is the binary
    entropy of each region, ln K is ln 2, and each region has its own mask.

    The perturbations are noise and dropout of whole channels in the teacher, at the places of the paper's V-Net: the
    bottleneck and the feature before the output layer. nnU-Net's networks have no dropout, so it is applied from
    outside, in training only, to student and teacher alike; the network that predicts is nnU-Net's.
    ``dropout_rate=0`` leaves noise alone.

    Deviations from the released code (88ed29a): nnU-Net's Dice + cross entropy with deep supervision; ln K and K for
    its ln 2 and 2; the entropy without 1e-6 in the logarithm, so that a uniform pbar has exactly ln K. Consistency on
    unlabeled patches only, as in the script that its README runs. The student predicts.
    """

    source = "Yu et al., MICCAI 2019, arXiv:1907.07034"
    year = 2019
    memory_factor = 2.4
    supervised_with: ClassVar[dict[str, Any]] = {"dropout_rate": 0.0}

    teacher_passes: int = 8
    """T; 4 halves the cost of a step."""
    dropout_rate: float = 0.5

    def check_settings(self) -> None:
        super().check_settings()
        check_value(self, "teacher_passes", self.teacher_passes >= 1, "at least 1")
        check_value(self, "dropout_rate", 0 <= self.dropout_rate < 1, "0 to below 1")

    def build_modules(self) -> dict[str, nn.Module]:
        # before the teacher is copied from the student
        for layer in self.dropout_layers(self.network):
            make_scalable(layer.module)
        return super().build_modules()

    def forward(self, step: Step) -> None:
        with self.dropout(self.network, len(step.labeled), len(step.unlabeled)):
            super().forward(step)

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        images = self.teacher_view(step)
        target = self.teacher_probabilities(self.with_noise(images))
        passes = (self.teacher_probabilities(self.with_noise(images)) for _ in range(self.teacher_passes))
        mean = sum(passes, start=torch.zeros_like(target)) / self.teacher_passes
        certain = self.certain(mean, step.progress)
        student = self.probabilities(step.unlabeled_logits)
        return {"consistency": self.weight(step) * self.masked_mean(squared_difference(student, target), certain)}

    def certain(self, mean: torch.Tensor, progress: float) -> torch.Tensor:
        """The mask m: boolean ``(N, 1, *P)``, or ``(N, R, *P)`` for regions, of mean probabilities ``(N, K, *P)``."""
        regions = self.label_manager.has_regions
        entropy = region_entropy(mean) if regions else class_entropy(mean)
        largest = math.log(2 if regions else mean.shape[1])
        return entropy < (0.75 + 0.25 * sigmoid_rampup(progress)) * largest

    def teacher_probabilities(self, images: torch.Tensor) -> torch.Tensor:
        with self.dropout(self.teacher.network, len(images)):
            return super().teacher_probabilities(images)

    def dropout_layers(self, network: nn.Module) -> tuple[FeatureLayer, ...]:
        """Layers whose channels are dropped; none without dropout."""
        network = unwrap(network)
        return (bottleneck(network), last_decoder_stage(network)) if self.dropout_rate > 0 else ()

    @contextmanager
    def dropout(self, network: nn.Module, *patches: int) -> Iterator[None]:
        """Drops channels in ``network``, anew for each patch of batches of these sizes that it is given as one."""
        layers = self.dropout_layers(network)
        uniform = [torch.cat([self.uniform(count, layer.channels) for count in patches]) for layer in layers]
        factors = [dropout_factors(numbers, self.dropout_rate) for numbers in uniform]
        with scaled_channels([layer.module for layer in layers], factors):
            yield
