"""What the device of a training refuses, in words of a user."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from nnssl.errors import UserError
from nnssl.trainers.engine.memory_check import described

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

# of the allocators of CUDA, of its libraries, of torch on the host
_MEMORY = ("out of memory", "alloc_failed", "can't allocate memory")
_COMPILERS = ("torch._dynamo.", "torch._inductor.", "torch._functorch.")


@contextmanager
def device_errors(trainer: SemiSupervisedTrainer) -> Iterator[None]:
    """Context in which errors of torch that a setting of the run can mend become ``UserError``.

    They are a lack of memory, operations that have no deterministic kernel on the device, and a network that cannot be
    compiled.
    """
    try:
        yield
    except RuntimeError as error:
        told = _in_words(error, trainer)
        if told is None:
            raise
        raise told from error


def _in_words(error: RuntimeError, trainer: SemiSupervisedTrainer) -> UserError | None:
    reason = (str(error).splitlines() or [""])[0]
    where = type(trainer).__name__
    if trainer.was_initialized:
        where = f"step {trainer.iteration}: {described(trainer)}"
    if isinstance(error, torch.OutOfMemoryError) or any(words in reason.lower() for words in _MEMORY):
        return UserError(
            f"the memory of {trainer.device} does not suffice",
            where=where,
            found=reason,
            fix="close other programs that use it and continue (--c, after the training --val). A step takes less with "
            "--micro-batch 1, which changes no result where the method allows it, with --set unlabeled_batch_size=1, "
            "and on a plan for less memory (nnssl_plan_and_preprocess -gpu_memory_target)",
        )
    if "does not have a deterministic implementation" in reason:
        return UserError(
            f"--deterministic is not possible with this network or method on {trainer.device}",
            where=where,
            found=reason.partition(",")[0],
            fix="train anew (--overwrite) without --deterministic",
        )
    if any(kind.__module__.startswith(_COMPILERS) for kind in type(error).__mro__):
        return UserError(
            "torch cannot compile the network on this machine",
            where=where,
            found=f"{type(error).__name__}: {reason}",
            fix="set the environment variable nnUNet_compile=f, which trains without compiling",
        )
    return None
