"""Whether the steps of a training fit into the memory of its device, and what to change if not."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from nnssl.errors import UserError
from nnssl.trainers.engine.device_memory import available
from nnssl.trainers.engine.micro_batch import obstacle_to_parts
from nnssl.trainers.engine.precision import cpu_has_bf16
from nnssl.trainers.engine.rehearsal import Changes, Estimate, rehearse

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def check_memory(trainer: SemiSupervisedTrainer) -> None:
    """Prints the estimated peak memory of the steps of an initialized trainer.

    Where it cannot be estimated, or the device's memory is not known, that is printed and the training goes on.
    Several ranks take what the main one finds.

    Raises:
        UserError: if the device has less, with the figures and the smallest change that fits.
    """
    if trainer.settings.memory_check:
        trainer.ranks.from_main(lambda: _check(trainer))


def _check(trainer: SemiSupervisedTrainer) -> None:
    room = available(trainer.device)
    if room is None:
        trainer.print_to_log_file(f"memory of a step: not estimated, {trainer.device.type} does not tell what it has")
        return
    try:
        estimate = rehearse(trainer)
    except Exception as error:  # the estimate is a service: what it stumbles over need not stop a training
        reason = (str(error).splitlines() or [""])[0]
        trainer.print_to_log_file(f"memory of a step: cannot be estimated ({type(error).__name__}: {reason})")
        return
    # the ranks of a machine share its RAM, and have a CUDA device each
    room = room // (trainer.ranks.local_size if trainer.device.type == "cpu" else 1) + estimate.held
    if estimate.total <= room:
        trainer.print_to_log_file(f"memory of a step: about {_figures(estimate)}; available {_size(room)}")
        return
    raise UserError(
        "a training step does not fit into the memory of the device",
        where=described(trainer),
        expected=f"at most {_size(room)}, which are available",
        found=f"about {_figures(estimate)}",
        fix=_advice(trainer, room),
    )


def _advice(trainer: SemiSupervisedTrainer, room: int) -> str:
    try:
        found = smallest_change(trainer, room)
    except Exception:  # as for the estimate
        found = None
    if found is None:
        return (
            "close other programs, or plan for less memory (nnssl_plan_and_preprocess -gpu_memory_target); "
            "--disable_memory_check starts all the same"
        )
    changes, estimate = found
    return f"{flags(trainer, changes)} (about {_size(estimate.total)}), or --disable_memory_check to start all the same"


def smallest_change(trainer: SemiSupervisedTrainer, room: int) -> tuple[Changes, Estimate] | None:
    """The mildest change by which a step fits into ``room`` bytes, and what it then takes; None if none suffices."""
    tried: dict[Changes, Estimate] = {}
    for setting, values in _options(trainer).items():
        # alone, and on top of what has helped most so far
        most = min(tried, key=lambda changes: tried[changes].total, default=Changes())
        for start in dict.fromkeys((Changes(), most)):
            for value in values:
                changes = replace(start, **{setting: value})
                tried[changes] = rehearse(trainer, changes)
                if tried[changes].total <= room:
                    return changes, tried[changes]
    return None


def _options(trainer: SemiSupervisedTrainer) -> dict[str, list[Any]]:
    """Values of `Changes` from the mildest on.

    Micro-batches change no result, a shorter number format next to nothing, fewer unlabeled patches the method.
    """
    options: dict[str, list[Any]] = {"micro_batch": []}
    if obstacle_to_parts(trainer) is None:
        options["micro_batch"] = _parts(trainer.settings.micro_batch or trainer.batch_size + trainer.num_unlabeled)
    if trainer.iteration > 0:
        return options  # a training that goes on keeps its settings
    options["precision"] = _shorter_formats(trainer)
    if trainer.uses_unlabeled:
        options["unlabeled"] = _parts(trainer.num_unlabeled)
    return options


def _parts(number: int) -> list[int]:
    """Size of the largest part of ``number`` patches in 2, 3, ... parts."""
    return sorted({-(-number // parts) for parts in range(2, number + 1)}, reverse=True)


def _shorter_formats(trainer: SemiSupervisedTrainer) -> list[str]:
    """A number format of 16 bits in which the device computes, if the training does not use one."""
    if trainer.precision.name != "fp32":
        return []
    if trainer.device.type == "cuda":
        return ["bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"]
    return ["bf16"] if cpu_has_bf16() else []


def flags(trainer: SemiSupervisedTrainer, changes: Changes) -> str:
    """The flags of ``nnssl_train`` that make ``changes``."""
    unlabeled = None if changes.unlabeled is None else changes.unlabeled * trainer.ranks.size
    values = {
        "--micro-batch ": changes.micro_batch,
        "--precision ": changes.precision,
        "--set unlabeled_batch_size=": unlabeled,
    }
    return " ".join(f"{flag}{value}" for flag, value in values.items() if value is not None)


def described(trainer: SemiSupervisedTrainer) -> str:
    """What trains where, in which number format, and on how many patches of which size."""
    shape = "x".join(map(str, trainer.configuration_manager.patch_size))
    ranks = "" if trainer.ranks.size == 1 else f" of {trainer.ranks.size} processes each"
    return (
        f"{type(trainer).__name__} on {trainer.device} in {trainer.precision.name}, {trainer.batch_size} labeled and "
        f"{trainer.num_unlabeled} unlabeled patches of {shape}{ranks}"
    )


def _figures(estimate: Estimate) -> str:
    parts = ", ".join(f"{name} {_size(size)}" for name, size in estimate.parts.most_common() if size)
    return f"{_size(estimate.total)} ({parts})"


def _size(size: int) -> str:
    return f"{size / 1024**3:.1f} GiB" if size >= 1024**3 else f"{size / 1024**2:.0f} MiB"
