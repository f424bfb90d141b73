"""Number format of the forward pass: what the device computes fastest without harm."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from nnssl.errors import UserError

NAMES = ("auto", "fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Precision:
    """``name`` is fp32, bf16 or fp16; ``device_type`` is torch's (cpu, cuda, mps)."""

    name: str
    device_type: str

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    def autocast(self) -> AbstractContextManager:
        """Context for forward passes; fp32 within another one, too."""
        if self.name == "fp32":
            return torch.autocast(self.device_type, enabled=False)
        return torch.autocast(self.device_type, dtype=self.dtype)

    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """Loss scaler, needed for fp16 only."""
        return torch.amp.GradScaler(self.device_type) if self.name == "fp16" else None


def choose_precision(device: torch.device, requested: str = "auto") -> Precision:
    """Precision for a device: fp16 on CUDA (as nnU-Net), bf16 on CPUs with bf16 instructions, fp32 elsewhere.

    Raises:
        UserError: if the requested format is unknown or the device has no such arithmetic.
    """
    if requested not in NAMES:
        raise UserError("unknown precision", found=requested, expected=", ".join(NAMES))
    if requested == "auto":
        automatic = {"cuda": "fp16", "cpu": "bf16" if cpu_has_bf16() else "fp32"}
        return Precision(automatic.get(device.type, "fp32"), device.type)
    if requested == "fp16" and device.type != "cuda":
        raise UserError("fp16 is available on CUDA devices only", found=f"device {device.type}", fix="--precision auto")
    if requested == "bf16" and device.type == "mps":
        raise UserError("bf16 is available on CUDA devices and CPUs only", found="device mps", fix="--precision auto")
    if requested == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("this CUDA device has no bf16 arithmetic", fix="--precision fp16")
    return Precision(requested, device.type)


@lru_cache(maxsize=1)
def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware (AVX512-BF16, AMX, or Arm BF16); elsewhere bf16 is emulated."""
    try:
        flags = Path("/proc/cpuinfo").read_text(errors="ignore")
    except OSError:
        return False
    words = set(flags.split())
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
