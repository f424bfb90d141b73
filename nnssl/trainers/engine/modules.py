"""Modules and optimizers beside the student and its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from nnssl.trainers.engine.distributed import synchronize_batch_norms

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What an optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def attach_modules(trainer: SemiSupervisedTrainer) -> None:
    """Builds the modules and optimizers of the method; the student's optimizer trains what no other one takes."""
    trainer._modules = {
        name: synchronize_batch_norms(module.to(trainer.device), trainer.ranks, trainer.device)
        for name, module in trainer.build_modules().items()
    }
    for name, module in trainer._modules.items():
        setattr(trainer, name, module)
    trainer._optimizers = trainer.build_optimizers()
    groups = [group for optimizer in trainer._optimizers.values() for group in optimizer.param_groups]
    for group in groups:
        group["initial_lr"] = group["lr"]
    taken = {id(p) for group in groups for p in group["params"]}
    for module in trainer._modules.values():
        trained = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
        if trained:
            trainer.optimizer.add_param_group({"params": trained})
