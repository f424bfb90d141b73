"""Several networks that predict as one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
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
        members: the networks; they are not copied. Numbers tell which of the networks of a method they are where some
            are missing; they are part of the names of the weights.
        regions: whether the channels are overlapping regions.
    """

    def __init__(self, members: Iterable[nn.Module] | Mapping[int, nn.Module], regions: bool = False):
        super().__init__()
        numbered = members if isinstance(members, Mapping) else dict(enumerate(members))
        self.members = nn.ModuleDict({str(number): member for number, member in numbered.items()})
        self.regions = regions

    def forward(self, x: torch.Tensor) -> Any:
        outputs = [member(x) for member in self.members.values()]
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
        decoder: Any = next(iter(self.members.values())).decoder
        return decoder.deep_supervision

    @deep_supervision.setter
    def deep_supervision(self, enabled: bool) -> None:
        for member in self.members.values():
            decoder: Any = member.decoder
            decoder.deep_supervision = enabled


def member_numbers(names: Iterable[str]) -> list[int]:
    """Numbers of the members of the `Ensemble` whose weights have these names; none if they belong to a single network.

    >>> member_numbers(["members.0.weight", "members.1.weight"]), member_numbers(["encoder.weight"])
    ([0, 1], [])
    """
    return sorted({int(name.split(".")[1]) for name in names if name.startswith("members.")})
