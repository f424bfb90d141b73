"""Seeds of the process that trains."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators of this process, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_step(seed: int, iteration: int, device: torch.device) -> None:
    """Seeds what a training step draws from (seed, iteration), so that it draws the same after a resumption.

    All ranks draw the same numbers: what differs between patches has to be drawn for the global batch (see
    ``SemiSupervisedTrainer.randn_like``). Nothing waits for the device.
    """
    python_seed, numpy_seed, torch_seed = (
        int(word) for word in np.random.SeedSequence((seed, iteration + 1)).generate_state(3)
    )
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    # torch.manual_seed asks for every kind of device, which takes longer than all the rest
    torch.random.default_generator.manual_seed(torch_seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(torch_seed)
    elif device.type == "mps":
        torch.mps.manual_seed(torch_seed)


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Leaves Python's, NumPy's and torch's generators (those of the CPU and of ``device``) as they are."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def make_deterministic() -> None:
    """Bit-exact repetition on the same machine: deterministic kernels only, no benchmark-chosen algorithms."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
