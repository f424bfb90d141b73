"""What a trainer knows about the step it is in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Step:
    """Patches and predictions of one training step.

    Attributes:
        labeled: images ``(B_l, C, *P)``.
        target: reference ``(B_l, 1, *S)`` (or one channel per region), one tensor per head, full resolution first.
        unlabeled: augmented images ``(B_u, C, *P)``; B_u is 0 if the method uses no unlabeled cases.
        iteration: steps done before this one.
        progress: share of the main phase that is done, 0 to 1.
        pseudo_target: pseudo-labels of the unlabeled patches in the form of ``target``; empty unless the stream
            delivers them.
        heads: logits of the student for ``[labeled; unlabeled]`` in float32, ``(B_l + B_u, K, *S)`` per head,
            full resolution first; filled by the forward pass.
        extra: the method's further targets, and what it hands from one hook to the next, such as masks of mixed
            patches.
    """

    labeled: torch.Tensor
    target: list[torch.Tensor]
    unlabeled: torch.Tensor
    iteration: int
    progress: float
    pseudo_target: list[torch.Tensor] = field(default_factory=list)
    heads: list[torch.Tensor] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> torch.Tensor:
        """Labeled, then unlabeled patches ``(B_l + B_u, C, *P)``."""
        return torch.cat([self.labeled, self.unlabeled]) if len(self.unlabeled) else self.labeled

    @property
    def labeled_heads(self) -> list[torch.Tensor]:
        """Logits of the labeled patches, one tensor per head."""
        return [head[: len(self.labeled)] for head in self.heads]

    @property
    def unlabeled_heads(self) -> list[torch.Tensor]:
        """Logits of the unlabeled patches, one tensor per head."""
        return [head[len(self.labeled) :] for head in self.heads]

    @property
    def labeled_logits(self) -> torch.Tensor:
        """Full-resolution logits of the labeled patches ``(B_l, K, *P)``."""
        return self.heads[0][: len(self.labeled)]

    @property
    def unlabeled_logits(self) -> torch.Tensor:
        """Full-resolution logits of the unlabeled patches ``(B_u, K, *P)``."""
        return self.heads[0][len(self.labeled) :]


def step_of(batch: dict[str, Any], device: torch.device, iteration: int, progress: float) -> Step:
    """A batch of the streams, moved to the device."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, non_blocking=True)

    def heads(target: Any) -> list[torch.Tensor]:
        return [move(tensor) for tensor in (target if isinstance(target, list) else [target])]

    labeled, unlabeled, pseudo = move(batch["data"]), batch.get("unlabeled"), batch.get("pseudo_target")
    return Step(
        labeled=labeled,
        target=heads(batch["target"]),
        unlabeled=labeled[:0] if unlabeled is None else move(unlabeled),
        iteration=iteration,
        progress=progress,
        pseudo_target=[] if pseudo is None else heads(pseudo),
        extra={name: move(tensor) for name, tensor in batch.get("extra", {}).items()},
    )
