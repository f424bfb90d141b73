"""A training step on tensors without memory, to learn how much memory it would take."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.device_memory import base, cpu_workspace, footprint
from nnssl.trainers.engine.distributed import Ranks
from nnssl.trainers.engine.memory_meter import MemoryMeter
from nnssl.trainers.engine.precision import choose_precision
from nnssl.trainers.engine.state import generators_kept

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

WEIGHTS = "weights"
# what belongs to the training and not to a step, or is made anew
_LEFT_OUT = {"network", "ranks", "logger", "loss", "grad_scaler", "dataloader_train", "dataloader_val", "meter"}
_PHASES = {
    "forward": "student",
    "supervised_loss": "supervised loss",
    "unsupervised_loss": "unsupervised terms",
    "pretrain_losses": "pretraining terms",
    "backward_and_update": "backward pass and optimizer",
}


@dataclass(frozen=True)
class Changes:
    """What a rehearsal does otherwise than the training; None leaves a setting as it is.

    ``unlabeled`` is the number of unlabeled patches of one rank.
    """

    micro_batch: int | None = None
    precision: str | None = None
    unlabeled: int | None = None


@dataclass(frozen=True)
class Estimate:
    """Memory of a training at the peak of its steps, in bytes.

    Attributes:
        parts: what it is made of.
        held: what the initialized trainer has taken of it already.
    """

    parts: Counter[str]
    held: int

    @property
    def total(self) -> int:
        return self.parts.total()


def rehearse(trainer: SemiSupervisedTrainer, changes: Changes | None = None) -> Estimate:
    """Estimates the peak memory of the steps of an initialized trainer, on one rank.

    A copy of the trainer, whose tensors have sizes but no memory, takes a step at the beginning of each phase of the
    training and one at its end, when an optimizer has its state. Every operation of a step is seen: those of the
    networks, of the method's own terms, of the backward pass. Networks are not compiled, which takes no less memory.
    ``trainer`` and the random generators stay as they are.

    Raises:
        Exception: whatever a step raises that asks for the values of tensors.
    """
    kind = trainer.device.type
    meter = MemoryMeter(kind, footprint(kind), cpu_workspace if kind == "cpu" else None)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with generators_kept(trainer.device), fake, torch.compiler.set_stance("force_eager"), meter:
        with meter.phase(WEIGHTS), _HollowCopies():
            double = _double(trainer, changes or Changes())
        held = meter.living.total()
        for name, phase in _PHASES.items():
            setattr(double, name, _in_phase(meter, phase, getattr(double, name)))
        last = double.num_epochs * double.num_iterations_per_epoch - 1
        for iteration in dict.fromkeys((0, double.pretrain_steps, last)):
            double.iteration = iteration
            with meter.phase("patches"):
                batch = _batch(double)
            double.train_step(batch)
    return Estimate(meter.at_peak + Counter({"libraries": base(kind)}), held)


class _HollowCopies(TorchFunctionMode):
    """Context in which tensors are copied by an operation that `FakeTensorMode` knows, as it does not `deepcopy`."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor = args[0]
        if tensor.numel() == 1:  # its value is kept: AdamW asks for the number of its steps
            with unset_fake_temporarily():
                value = tensor.item()
            return torch.tensor(value, dtype=tensor.dtype, device=tensor.device)
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _double(trainer: SemiSupervisedTrainer, changes: Changes) -> Any:
    """Copy of ``trainer`` that shares nothing with it which a step changes, and trains alone on its rank's patches."""
    double: Any = object.__new__(type(trainer))
    # the copies of a network's parameters are those in the copies of its optimizer, its teachers
    memo: dict[int, Any] = {id(trainer): double}
    double.network = memo[id(trainer.network)] = copy.deepcopy(unwrap(trainer.network), memo)
    for name, value in vars(trainer).items():
        if name not in _LEFT_OUT:
            setattr(double, name, copy.deepcopy(value, memo))
    double.ranks = Ranks()
    double.unlabeled_batch_size = changes.unlabeled or trainer.num_unlabeled
    double.settings = replace(trainer.settings, micro_batch=changes.micro_batch or trainer.settings.micro_batch)
    if changes.precision is not None:
        double.precision = choose_precision(trainer.device, changes.precision)
    double.grad_scaler = None  # asks for values, and takes no memory
    double.loss = double._build_loss()
    double.print_to_log_file = _silent
    double.network.train()
    return double


def _in_phase(meter: MemoryMeter, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def measured(*args: Any, **kwargs: Any) -> Any:
        with meter.phase(phase):
            return function(*args, **kwargs)

    return measured


def _batch(trainer: SemiSupervisedTrainer) -> dict[str, Any]:
    """A batch as the streams deliver it."""
    patch_size = tuple(trainer.configuration_manager.patch_size)
    scales = trainer._get_deep_supervision_scales() or [[1.0] * len(patch_size)]
    manager = trainer.label_manager
    channels, dtype = 1, torch.int16
    if manager.has_regions:
        channels, dtype = len(manager.foreground_regions) + manager.has_ignore_label, torch.bool
    shapes = [[round(n * s) for n, s in zip(patch_size, scale, strict=True)] for scale in scales]
    image = (trainer.num_input_channels, *patch_size)

    def target(patches: int) -> list[torch.Tensor]:
        return [torch.empty(patches, channels, *shape, dtype=dtype) for shape in shapes]

    return {
        "data": torch.empty(trainer.batch_size, *image),
        "target": target(trainer.batch_size),
        "keys": ["case"] * trainer.batch_size,
        "unlabeled": torch.empty(trainer.num_unlabeled, *image) if trainer.uses_unlabeled else None,
        # after the first phase of a method that works between phases
        "pseudo_target": target(trainer.num_unlabeled) if trainer.phase_starts else None,
        "extra": _extra_targets(trainer, torch.Size([channels, *patch_size]), dtype),
    }


def _extra_targets(trainer: SemiSupervisedTrainer, shape: torch.Size, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The method's further targets, with the shape and number format that its functions give them."""
    hollow = {}
    for name, function in trainer.extra_targets().items():
        with unset_fake_temporarily():
            made = function(torch.zeros(shape, dtype=dtype))
        hollow[name] = torch.empty(trainer.batch_size, *made.shape, dtype=made.dtype)
    return hollow


def _silent(*args: Any, **kwargs: Any) -> None:
    """Takes the place of the log."""
