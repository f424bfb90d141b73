"""Cross pseudo supervision: two networks label the patches for each other."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from nnssl.losses.schedules import sigmoid_rampup
from nnssl.networks.ensemble import Ensemble
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.requirements import check_weights
from nnssl.trainers.engine.step import Step
from nnssl.trainers.registry import register
from nnssl.trainers.two_students import TwoStudents


@register
class CPS(TwoStudents):
    """Cross pseudo supervision (Chen et al., CVPR 2021, arXiv:2106.01226).

    Two networks of the same architecture start from different weights and see the same patches. Both learn from the
    labels, and each from the hard labels of the other, through which no gradient flows (their equations 1 to 4)::

        L = L_nnU-Net(o_1, y) + L_nnU-Net(o_2, y) + w(p) * [CE(o_1, argmax o_2) + CE(o_2, argmax o_1)]
        w(p) = cross_weight * exp(-5 (1 - p)^2),   p = share of the main phase that is done

    Weight, ramp and data of the cross term (unlabeled patches only) are those of the 3D medical form (SSL4MIS), which
    the medical comparisons use. The original uses 1.5, no ramp, and labeled and unlabeled patches alike:
    ``--set cross_weight=1.5 --set cross_ramp=False --set cross_data=all``.

    Deviations: nnU-Net's Dice + cross entropy with deep supervision on labeled patches; the cross term is taken at full
    resolution. Both networks have nnU-Net's initialization with other random numbers (SSL4MIS: Kaiming and Xavier), and
    an optimizer of their own; gradients are clipped for each. Pretrained weights go into both, as in the original;
    the segmentation layers, which they leave out, then make the difference. With regions the hard labels are
    thresholds at one half and the cross entropy is binary.

    Network 1 predicts, as in the original. ``deploy=mean`` averages the probabilities of both (`Ensemble`):
    nnssl_predict knows such a model, stock nnU-Net does not, and nnssl_export refuses it.
    """

    source = "Chen et al., CVPR 2021, arXiv:2106.01226"
    year = 2021
    status = "official code"
    memory_factor = 3.75

    cross_weight: float = 0.1
    cross_ramp: bool = True
    cross_data: Literal["unlabeled", "all"] = "unlabeled"
    deploy: Literal["first", "mean"] = "first"

    def check_settings(self) -> None:
        super().check_settings()
        check_weights(self, "cross_weight")

    def forward(self, step: Step) -> None:
        super().forward(step)
        step.extra["second_heads"] = self.heads(self.second, step.images)

    def second_supervised_loss(self, step: Step) -> torch.Tensor:
        """nnU-Net's loss of network 2 on the labeled patches."""
        heads = [head[: len(step.labeled)] for head in step.extra["second_heads"]]
        return self.segmentation_loss(heads, step.target)

    def pretrain_losses(self, step: Step) -> dict[str, torch.Tensor]:
        return {**super().pretrain_losses(step), "second_supervised": self.second_supervised_loss(step)}

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        begin = len(step.labeled) if self.cross_data == "unlabeled" else 0
        first, second = step.heads[0][begin:], step.extra["second_heads"][0][begin:]
        weight = self.cross_weight * (sigmoid_rampup(step.progress) if self.cross_ramp else 1.0)
        return {
            "second_supervised": self.second_supervised_loss(step),
            "cross": weight * self.cross_entropy(first, self.hard_labels(second)),
            "second_cross": weight * self.cross_entropy(second, self.hard_labels(first)),
        }

    def deployed_network(self) -> nn.Module:
        first = unwrap(self.network)
        return first if self.deploy == "first" else Ensemble([first, self.second], self.label_manager.has_regions)
