"""What a trainer shows to its networks, and which labels it compares their predictions with.

Methods need no code for it: networks are watched where images enter them, and labels where the losses are called that
all methods share.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.preview import inner_network, label_map
from nnssl.trainers.engine.step import Step

NO_LABEL = -1


@dataclass
class Pass:
    """One pass of patches through a network.

    Attributes:
        network: ``student``, or the name of the trainer's module.
        step: counted from 0.
        images: ``(N, C, *P)``.
        labels: ``(N, *P)`` hard labels that predictions were compared with, `NO_LABEL` where there are none; regions
            count from 1 in the order of the heads, later ones over earlier ones.
    """

    network: str
    step: int
    images: torch.Tensor
    labels: torch.Tensor


class Recorder:
    """Records the passes of a trainer while it is in `watching`.

    Args:
        trainer: initialized.

    Attributes:
        passes: in their order.
        pictures: of each step of a method that has some: images, and what it made of them, by name, ``(N, C, *P)``.
        step: to be counted up by whoever takes the steps.
    """

    def __init__(self, trainer: SemiSupervisedTrainer):
        self.trainer = trainer
        self.passes: list[Pass] = []
        self.pictures: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
        self.step = 0
        self._names = {id(inner_network(trainer.network)): "student"}
        self._names |= {id(inner_network(module)): name for name, module in trainer._modules.items()}
        # outputs are kept, or their memory would be given to others while a step goes on
        self._outputs: dict[int, tuple[torch.Tensor, Pass]] = {}
        self._in_heads = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While inside, the trainer's networks and losses are watched."""
        trainer: Any = self.trainer
        heads, loss, cross_entropy = trainer.heads, trainer.segmentation_loss, trainer.cross_entropy
        after_step = trainer.after_step

        def watched_heads(network: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
            self._in_heads = True
            try:
                result = heads(network, images)
            finally:
                self._in_heads = False
            seen = self._note(self._names.get(id(inner_network(network)), type(network).__name__), images)
            self._outputs[result[0].untyped_storage().data_ptr()] = result[0], seen
            return result

        def watched_loss(heads: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
            self._told(heads[0], target[0], None)
            return loss(heads, target)

        def watched_cross_entropy(
            logits: torch.Tensor,
            target: torch.Tensor,
            weight: torch.Tensor | None = None,
            class_weights: torch.Tensor | None = None,
        ) -> torch.Tensor:
            self._told(logits, target, weight)
            return cross_entropy(logits, target, weight, class_weights)

        def watched_after_step(step: Step) -> None:
            after_step(step)
            pictures = trainer.pictures(step)
            if pictures:
                kept = {name: picture.detach().float().cpu() for name, picture in pictures.items()}
                self.pictures.append((step.images.float().cpu(), kept))

        hooks = [self._hook(network, name) for network, name in self._networks()]
        trainer.heads, trainer.segmentation_loss = watched_heads, watched_loss
        trainer.cross_entropy, trainer.after_step = watched_cross_entropy, watched_after_step
        try:
            yield
        finally:
            for name in ("heads", "segmentation_loss", "cross_entropy", "after_step"):
                delattr(trainer, name)
            for hook in hooks:
                hook.remove()
            self._outputs.clear()

    def _networks(self) -> Iterator[tuple[nn.Module, str]]:
        yield inner_network(self.trainer.network), "student"
        for name, module in self.trainer._modules.items():
            yield inner_network(module), name

    def _hook(self, network: nn.Module, name: str) -> Any:
        """Watches passes that do not go through ``heads``, such as those of methods that call the encoder."""
        patch = tuple(self.trainer.configuration_manager.patch_size)

        def enters(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            images = arguments[0] if arguments else None
            if self._in_heads or not isinstance(images, torch.Tensor):
                return
            if images.shape[1] == self.trainer.num_input_channels and tuple(images.shape[2:]) == patch:
                self._note(name, images)

        encoder = getattr(network, "encoder", network)
        return encoder.register_forward_pre_hook(enters)

    def _note(self, network: str, images: torch.Tensor) -> Pass:
        labels = torch.full((len(images), *images.shape[2:]), NO_LABEL, dtype=torch.int16)
        self.passes.append(Pass(network, self.step, images.detach().float().cpu(), labels))
        return self.passes[-1]

    def _told(self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None) -> None:
        """Notes labels with the pass whose output, or some consecutive rows of it, ``logits`` is."""
        _, seen = self._outputs.get(logits.untyped_storage().data_ptr(), (None, None))
        if seen is None or target.shape[2:] != seen.images.shape[2:]:
            return
        first = logits.storage_offset() // logits.stride(0)
        labels = seen.labels[first : first + len(logits)]
        where = torch.ones_like(labels, dtype=torch.bool)
        if weight is not None:
            where = (weight > 0).any(1).cpu().expand_as(labels)
        labels[where] = label_map(self.trainer, target)[where]
