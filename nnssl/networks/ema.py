"""Teacher network whose weights are an exponential moving average of a student's."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn


class EMATeacher(nn.Module):
    """Copy of ``student`` that learns by averaging only (Tarvainen & Valpola, NIPS 2017, equation 1).

    Parameters never receive a gradient and ``forward`` builds no graph. Buffers are copied from the student, not
    averaged. The update runs in two fused operations over flat lists and never waits for the device.

    Args:
        student: network to follow; it must not be wrapped (``torch.compile``, DDP): pass the module inside.
    """

    def __init__(self, student: nn.Module):
        super().__init__()
        self.network = deepcopy(student).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, student: nn.Module, decay: float) -> None:
        """``teacher <- decay * teacher + (1 - decay) * student``; decay 0 copies the student, 1 freezes the teacher.

        Raises:
            ValueError: if decay is outside [0, 1].
        """
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        mine: list[torch.Tensor] = list(self.network.parameters())
        theirs: list[torch.Tensor] = list(student.parameters())
        torch._foreach_lerp_(mine, theirs, 1.0 - decay)
        buffers = list(self.network.buffers())
        if buffers:
            torch._foreach_copy_(buffers, list(student.buffers()))

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> Any:
        return self.network(x)

    def train(self, mode: bool = True) -> EMATeacher:
        """Stays in evaluation mode, whatever its owner does."""
        return super().train(False)
