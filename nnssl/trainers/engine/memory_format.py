"""Layout of tensors in memory: which one is faster depends on CPU, width and patch, so it is measured."""

from __future__ import annotations

import statistics
import time
from copy import deepcopy

import torch
from torch import nn

from nnssl.errors import UserError
from nnssl.trainers.engine.precision import Precision

NAMES = ("auto", "contiguous", "channels_last")
_REPETITIONS = 3


def memory_format(name: str, dimensions: int) -> torch.memory_format:
    """torch's format for a name of `NAMES` (not auto) and 2 or 3 spatial dimensions."""
    if name == "contiguous":
        return torch.contiguous_format
    return torch.channels_last if dimensions == 2 else torch.channels_last_3d


def check_memory_format(name: str) -> None:
    """Raises ``UserError`` for an unknown name."""
    if name not in NAMES:
        raise UserError("unknown memory format", found=name, expected=", ".join(NAMES))


def measure_memory_formats(
    network: nn.Module, input_shape: tuple[int, ...], device: torch.device, precision: Precision
) -> dict[str, float]:
    """Median seconds of a forward and backward pass of ``network`` in each format.

    Works on a copy, with random input of shape ``(N, C, *S)`` and without touching the random generators.
    """
    dimensions = len(input_shape) - 2
    seconds = {}
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(input_shape, generator=generator).to(device)
    for name in NAMES[1:]:
        layout = memory_format(name, dimensions)
        copy = deepcopy(network).to(memory_format=layout)
        x = example.to(memory_format=layout)
        times = []
        for _ in range(1 + _REPETITIONS):
            start = time.perf_counter()
            with precision.autocast():
                output = copy(x)
            heads = output if isinstance(output, (list, tuple)) else [output]
            sum(head.float().square().mean() for head in heads).backward()
            times.append(time.perf_counter() - start)
        seconds[name] = statistics.median(times[1:])
    return seconds
