"""A CUDA device without memory, on which steps show where tensors of the host and of the device meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl.trainers.engine.blocks import BuildingBlocks
from nnssl.trainers.engine.modules import parameters_of
from nnssl.trainers.engine.precision import Precision
from nnssl.trainers.engine.rehearsal import _HollowCopies


@contextmanager
def hollow_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Context in which tensors have a device, a shape and a number format, but no values; yields ``cuda:0``.

    On machines without a GPU. Operations on tensors of the host and of the device fail as they do on a GPU, autocast
    computes in the number formats of CUDA, and so do its refusals. Trainers of `Tiny` are built on the device. What
    needs kernels is left out: a backward pass leaves gradients of zeros, optimizers look at their parameters, losses
    are not scaled, networks are not compiled.
    """
    device = torch.device("cuda", 0)
    with monkeypatch.context() as patch:
        patch.setenv("nnUNet_compile", "false")
        patch.setattr("tests.support.tiny.DEVICE", device)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(Precision, "grad_scaler", lambda precision: None)
        patch.setattr(nn.Module, "_apply", _apply)
        patch.setattr(BuildingBlocks, "backward", _backward)
        for optimizer in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
            patch.setattr(optimizer, "step", _look_at_parameters)
        with FakeTensorMode(allow_non_fake_inputs=True), _HollowCopies():
            yield device


def _apply(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Torch's own swaps the contents of tensors, which tensors without values do not have.

    Optimizers know the parameters that are on the device already, so these stay.
    """
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or parameter.is_cuda:
                continue
            if id(parameter) not in made:
                applied = function(parameter.detach())
                # both are kept: a number of a tensor that has gone may be given to another
                made[id(parameter)] = (parameter, nn.Parameter(applied, parameter.requires_grad))
            part._parameters[name] = made[id(parameter)][1]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


def _backward(trainer: Any, loss: torch.Tensor, *optimizers: torch.optim.Optimizer) -> None:
    assert loss.requires_grad
    assert loss.ndim == 0
    assert loss.device == trainer.device
    for module in (trainer.network, *trainer._modules.values()):
        for parameter in module.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


def _look_at_parameters(optimizer: torch.optim.Optimizer, closure: None = None) -> None:
    for parameter in parameters_of(optimizer):
        assert parameter.device.type == "cuda"
