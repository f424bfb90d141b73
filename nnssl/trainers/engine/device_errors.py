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


@contextmanager
def device_errors(trainer: SemiSupervisedTrainer) -> Iterator[None]:
    """Context in which errors of torch that a setting of the run can mend become ``UserError``.

    They are a lack of memory, and operations that have no deterministic kernel on the device.
    """
    try:
        yield
    except RuntimeError as error:
        told = _in_words(error, trainer)
        if told is None:
            raise
        raise told from error


def _in_words(error: RuntimeError, trainer: SemiSupervisedTrainer) -> UserError | None:
    where, reason = f"step {trainer.iteration}: {described(trainer)}", (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in reason:
        return UserError(
            f"the memory of {trainer.device} does not suffice",
            where=where,
            found=reason,
            fix="close other programs that use the device; or continue (--c) with --micro-batch 1, which changes no "
            "result where the method allows it; or train anew with --set unlabeled_batch_size=1, or on a plan for less "
            "memory (nnssl_plan_and_preprocess -gpu_memory_target)",
        )
    if "does not have a deterministic implementation" in reason:
        return UserError(
            f"--deterministic is not possible with this network or method on {trainer.device}",
            where=where,
            found=reason.partition(",")[0],
            fix="train anew (--overwrite) without --deterministic",
        )
    return None
