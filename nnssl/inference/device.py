"""Choice of the device for prediction."""

from __future__ import annotations

import torch

from nnssl.errors import UserError


def choose_device(requested: str | None = None) -> torch.device:
    """The device called ``cpu``, ``cuda`` or ``mps``; without a name CUDA if there is a device, else the CPU.

    Raises:
        UserError: for other names (one of several GPUs is chosen with ``CUDA_VISIBLE_DEVICES``, as in nnU-Net) and
            for a device that this machine does not have.
    """
    if requested is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if requested not in ("cpu", "cuda", "mps"):
        raise UserError(
            "unknown device",
            found=requested,
            expected="cpu, cuda or mps",
            fix="choose one of several GPUs with CUDA_VISIBLE_DEVICES",
        )
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available[requested]:
        raise UserError(f"this machine has no {requested} device that torch can use", fix="-device cpu")
    return torch.device(requested)
