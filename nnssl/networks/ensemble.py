"""Several networks that predict as one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class Ensemble(nn.Module):
    """Mean of the probabilities of networks that may differ in their architecture.

    The output is what a single network would return: logits whose softmax (sigmoid where labels are overlapping
    regions) is exactly the mean of the members' probabilities, in float32. Members return one tensor ``(N, K, *S)``,
    or one per head of deep supervision, equally many and of equal shapes.

    Like nnU-Net's networks it is switched between one output and a list by ``network.decoder.deep_supervision``, which
    here sets that of every member.

    Args:
        members: the networks; they are not copied.
        regions: whether the channels are overlapping regions.
    """

    def __init__(self, members: Iterable[nn.Module], regions: bool = False):
        super().__init__()
        self.members = nn.ModuleList(members)
        self.regions = regions

    def forward(self, x: torch.Tensor) -> Any:
        outputs = [member(x) for member in self.members]
        if isinstance(outputs[0], (list, tuple)):
            return [self._mean(heads) for heads in zip(*outputs, strict=True)]
        return self._mean(outputs)

    def _mean(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        stacked = torch.stack([output.float() for output in logits])
        if self.regions:
            return F.logsigmoid(stacked).logsumexp(0) - F.logsigmoid(-stacked).logsumexp(0)
        return F.log_softmax(stacked, 2).logsumexp(0) - math.log(len(logits))

    @property
    def decoder(self) -> Ensemble:
        """Itself, as the place of the switch `deep_supervision`."""
        return self

    @property
    def deep_supervision(self) -> bool:
        """Whether the members return one output per head."""
        decoder: Any = self.members[0].decoder
        return decoder.deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        for member in self.members:
            decoder: Any = member.decoder
            decoder.deep_supervision = enabled


def count_members(names: Iterable[str]) -> int:
    """Members of the `Ensemble` whose weights have these names; 0 if they belong to a single network.

    >>> count_members(["members.0.weight", "members.1.weight"]), count_members(["encoder.weight"])
    (2, 0)
    """
    return len({name.split(".")[1] for name in names if name.startswith("members.")})
