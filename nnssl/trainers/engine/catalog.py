"""The registry as text for people."""

from __future__ import annotations

import inspect
from typing import Any

from nnssl.errors import UserError
from nnssl.trainers.engine.settings import hyperparameters
from nnssl.trainers.registry import get_trainer, registered_trainers


def table() -> str:
    """One line per trainer: year, cases it needs at least, what it can do, memory, status, source."""
    header = ("trainer", "year", "labeled", "unlabeled", "dims", "regions", "ignore", "cascade", "memory", "status")
    rows = [header]
    trainer: Any
    for name, trainer in registered_trainers().items():
        rows.append(
            (
                name,
                str(trainer.year),
                f">= {trainer.min_labeled}",
                f">= {trainer.min_unlabeled}" if trainer.uses_unlabeled else "none",
                "/".join(f"{d}D" for d in trainer.dimensions),
                *("yes" if able else "no" for able in _abilities(trainer)),
                f"x{trainer.memory_factor:g}",
                trainer.status,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, "", "nnssl_trainers NAME shows a method and its hyper-parameters."])


def describe(name: str) -> str:
    """Documentation, source and hyper-parameters of one trainer.

    Raises:
        UserError: if the trainer is unknown, or is nnU-Net's own.
    """
    trainer: Any = get_trainer(name)
    if name not in registered_trainers():
        raise UserError(f"{name} is a trainer of nnU-Net; its documentation is there")
    settings = [f"  {key} = {value!r}" for key, value in hyperparameters(trainer).items()]
    parts = [
        f"{name} ({trainer.source}; status: {trainer.status})",
        inspect.getdoc(trainer) or "",
        "Hyper-parameters (--set name=value); in short trainings recipe=auto changes those of optimizer and loss",
    ]
    return "\n\n".join(parts) + "\n" + "\n".join(settings)


def _abilities(trainer: Any) -> tuple[bool, bool, bool]:
    return trainer.supports_regions, trainer.supports_ignore_label, trainer.supports_cascade
