"""Choice of the layout of a training's tensors in memory."""

from __future__ import annotations

import time
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch import nn

from nnssl.errors import UserError
from nnssl.networks.memory_format import layout_named, set_memory_format
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.precision import Precision

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

NAMES = ("auto", "contiguous", "channels_last")
_REPETITIONS = 3


def check_memory_format(name: str) -> None:
    """Raises ``UserError`` for an unknown name."""
    if name not in NAMES:
        raise UserError("unknown memory format", found=name, expected=", ".join(NAMES))


def choose_memory_format(trainer: SemiSupervisedTrainer) -> None:
    """Lays out the network of ``trainer`` as its settings ask for, and records what ``auto`` has become."""
    network, patch_size = unwrap(trainer.network), trainer.configuration_manager.patch_size
    settings, device = trainer.settings, trainer.device
    name = settings.memory_format
    if name == "auto":
        # CUDA kernels of nnU-Net's networks are contiguous; on CPUs channels-last is faster in fp32 at every width
        # and patch that was measured (docs/performance.md), in bf16 it depends on them
        name = "channels_last" if device.type == "cpu" else "contiguous"
        if trainer.precision.name == "bf16" and device.type == "cpu" and not settings.deterministic:
            # few patches, because whether the memory suffices for all is checked later
            patches = min(2, settings.micro_batch or 2, trainer.batch_size + trainer.num_unlabeled)
            shape = (patches, trainer.num_input_channels, *patch_size)
            seconds = trainer.ranks.from_main(lambda: measure_memory_formats(network, shape, device, trainer.precision))
            name = min(seconds, key=lambda key: seconds[key])
            timings = ", ".join(f"{key} {value:.3f} s" for key, value in seconds.items())
            trainer.print_to_log_file(f"forward and backward pass by memory format: {timings}; taking {name}")
        settings.memory_format = name
    trainer.memory_format = layout_named(name, len(patch_size))
    set_memory_format(network, trainer.memory_format)


def measure_memory_formats(
    network: nn.Module, input_shape: tuple[int, ...], device: torch.device, precision: Precision
) -> dict[str, float]:
    """Shortest seconds of a forward and backward pass of ``network`` in each layout, taken in turn.

    Works on copies, with random input of shape ``(N, C, *S)`` and without touching the random generators.
    """
    dimensions = len(input_shape) - 2
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(input_shape, generator=generator).to(device)
    copies = {name: deepcopy(network) for name in NAMES[1:]}
    for name, copy in copies.items():
        set_memory_format(copy, layout_named(name, dimensions))
    seconds = dict.fromkeys(copies, float("inf"))
    for repetition in range(1 + _REPETITIONS):
        for name, copy in copies.items():
            start = time.perf_counter()
            with precision.autocast():
                output = copy(example.contiguous(memory_format=layout_named(name, dimensions)))
            heads = output if isinstance(output, (list, tuple)) else [output]
            sum(head.float().square().mean() for head in heads).backward()
            if repetition > 0:  # the first one builds kernels
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds
