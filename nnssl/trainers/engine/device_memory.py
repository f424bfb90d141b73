"""Memory of devices: what is left, and what tensors take of it beside their own bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

MIB = 1024**2
_FORWARD = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default
# On CPUs, fitted to the measurements in docs/performance.md: glibc maps blocks from this size on one by one and gives
# them back when they are freed (the rest is for copies within kernels, which are not seen); smaller ones share a heap,
# which keeps holes; a first step loads code, starts threads and keeps primitives of oneDNN.
_MAPPED = 32 * MIB
_MAPPED_SHARE = 1.12
_HEAP_SHARE = 1.4
_CPU_BASE = 64 * MIB
# blocks of torch's CUDA allocator, its holes, and the libraries' own: assumed, not measured
_CUDA_BLOCK = 512
_CUDA_HOLES = 1.1
_CUDA_BASE = 512 * MIB


def footprint(device_type: str) -> Callable[[int], int]:
    """Memory that a tensor of n bytes takes on a device, as a function of n."""
    if device_type == "cuda":
        return lambda size: int(_CUDA_HOLES * _CUDA_BLOCK * -(-size // _CUDA_BLOCK))
    if device_type == "cpu":
        return lambda size: int((_MAPPED_SHARE if size >= _MAPPED else _HEAP_SHARE) * size)
    return int


def base(device_type: str) -> int:
    """Bytes that a training takes of a device beside all tensors."""
    return {"cpu": _CPU_BASE, "cuda": _CUDA_BASE}.get(device_type, 0)


def cpu_workspace(function: Any, arguments: tuple, result: Any) -> int:
    """Bytes that an operation on (fake) tensors of a CPU takes while it runs: those of convolutions count.

    oneDNN's kernels work on copies of tensors that are not channels-last. torch's own kernels, which it prefers for
    single small samples, unfold their input into one column per voxel.
    """
    if function is _FORWARD:
        images, weight, bias, *geometry = arguments
        bias_sizes = None
        output = result
        tensors = (images, weight, output)
    elif function is _BACKWARD:
        output, images, weight, bias_sizes, *geometry = arguments[:10]
        bias = None
        tensors = (output, images, weight, *(t for t in result if t is not None))
    else:
        return 0
    backend = torch._C._select_conv_backend(images, weight, bias, *geometry, bias_sizes)
    if backend.name.startswith("Slow"):
        transposed = geometry[3]
        voxels = (images if transposed else output)[:, :1].numel()
        return weight[0].numel() * voxels * weight.element_size()
    layout = torch.channels_last if images.ndim == 4 else torch.channels_last_3d
    if images.is_contiguous(memory_format=layout):
        return 0
    return sum(t.numel() * t.element_size() for t in tensors)


def available(device: torch.device) -> int | None:
    """Bytes that this process can still take on ``device``; None if that cannot be told.

    On CUDA the device's free memory and what torch's allocator holds in reserve; on a CPU the RAM that is free or can
    be freed, and no more than the control groups of this process allow.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        return min([*_free_ram(), *_group_limits()], default=None)
    return None


def _free_ram(file: Path = Path("/proc/meminfo")) -> Iterator[int]:
    if file.is_file():
        for line in file.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024 * int(line.split()[1])


def _group_limits(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """Room below each memory limit of the control groups that this process is in, of version 1 or 2."""
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files, root = ("memory.max", "memory.current", "inactive_file"), mount
        elif "memory" in controllers.split(","):
            files, root = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), mount / "memory"
        else:
            continue
        folder = root / path.lstrip("/")
        # a limit of a group holds for all below it; in a container only the upper end of the path may be seen
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                yield from _room(group, *files)


def _room(group: Path, limit_file: str, usage_file: str, cache: str) -> Iterator[int]:
    try:
        limit, usage = (group / limit_file).read_text().strip(), int((group / usage_file).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return
    if limit != "max":
        # cached files that nobody uses count as used, yet give way
        yield max(0, int(limit) - usage + int(statistics.get(cache, 0)))
