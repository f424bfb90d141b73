"""What methods share that train two networks at once."""

from __future__ import annotations

import torch
from torch import nn

from nnssl.trainers.base import SemiSupervisedTrainer


class TwoStudents(SemiSupervisedTrainer):
    """A second student beside ``network``, with weights and an optimizer of its own; gradients are clipped for each.

    Comes before other bases of a trainer. Pretrained weights go into both; the segmentation layers, which they leave
    out, then make the difference.
    """

    trained_networks = 2

    second: nn.Module

    def new_second(self) -> nn.Module:
        """The second student with its initial weights."""
        return self.new_pretrained_network()

    def build_modules(self) -> dict[str, nn.Module]:
        return {**super().build_modules(), "second": self.new_second()}

    def build_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {**super().build_optimizers(), "second": self.new_optimizer(self.second.parameters())}

    def backward_and_update(self, loss: torch.Tensor, *optimizers: torch.optim.Optimizer) -> None:
        super().backward_and_update(loss, *(optimizers or (self.optimizer, self._optimizers["second"])))
