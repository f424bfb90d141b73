"""Whether the passes of a training can be cut into micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from nnssl.errors import UserError
from nnssl.networks.channel_dropout import is_scalable
from nnssl.networks.unwrap import unwrap

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def obstacle_to_parts(trainer: SemiSupervisedTrainer) -> str | None:
    """Why passes in parts would change what an initialized trainer learns, in words; None if they would not."""
    for network in (unwrap(trainer.network), *trainer._modules.values()):
        trained = any(p.requires_grad for p in network.parameters())
        for name, layer in network.named_modules():
            # a teacher's batch norm uses stored statistics and mixes nothing
            if isinstance(layer, _BatchNorm) and (trained or layer.training):
                return f"batch normalization mixes the samples of a pass (layer {name})"
            if isinstance(layer, _DropoutNd) and layer.p > 0 and (trained or layer.training):
                return f"dropout would draw other numbers (layer {name})"
            if is_scalable(layer):
                return f"the method scales the channels of each patch in a pass (layer {name})"
            if layer._forward_hooks or layer._forward_pre_hooks:
                return f"the method reads a layer by a hook, which would see the parts one by one (layer {name})"
    return None


def check_micro_batch(trainer: SemiSupervisedTrainer) -> None:
    """Raises ``UserError`` if micro-batches are asked for and would change what an initialized trainer learns."""
    if trainer.settings.micro_batch is None:
        return
    obstacle = obstacle_to_parts(trainer)
    if obstacle is not None:
        raise UserError(
            f"micro-batches would change the result: {obstacle}",
            where=f"{type(trainer).__name__}, configuration {trainer.configuration_name}",
            fix="leave --micro-batch out",
        )
