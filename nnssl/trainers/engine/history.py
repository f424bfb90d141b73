"""Every named loss of every epoch, kept with the checkpoint and written as ``curves.csv``."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nnssl.utils.files import atomic_path


class LossMeter:
    """Collects the losses of an epoch on the device; nothing waits for it until the epoch is over."""

    def __init__(self) -> None:
        self._values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, losses: dict[str, torch.Tensor]) -> None:
        for name, value in losses.items():
            self._values[name].append(value.detach())

    def average(self, mean: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replaces every value by its mean over the ranks; ``mean`` takes it of a tensor of any shape."""
        if self._values:
            together = mean(torch.stack([value for row in self._values.values() for value in row]))
            parts = together.split([len(row) for row in self._values.values()])
            self._values.update({name: list(part) for name, part in zip(self._values, parts, strict=True)})

    def means(self) -> dict[str, float]:
        """Mean of every loss since the last `clear`, in the order in which the names were first seen."""
        return {name: torch.stack(values).double().mean().item() for name, values in self._values.items()}

    def finite_means(self) -> dict[str, float]:
        """`means` of the finite values; NaN for a loss that has none."""
        rows = {name: torch.stack(values).double() for name, values in self._values.items()}
        return {name: row[row.isfinite()].mean().item() for name, row in rows.items()}

    def count_infinite(self) -> int:
        """How many values since the last `clear` are NaN or infinite, of the loss of which most are."""
        return max((int((~torch.stack(values).isfinite()).sum()) for values in self._values.values()), default=0)

    def clear(self) -> None:
        self._values.clear()

    def state(self) -> dict[str, torch.Tensor]:
        return {name: torch.stack(values).cpu() for name, values in self._values.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self._values = defaultdict(list, {name: list(values.unbind()) for name, values in state.items()})


class History:
    """One row of named numbers per epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        self.rows.append(row)

    def write_csv(self, path: Path) -> None:
        """Writes all rows; a column that an epoch does not have stays empty."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(self.rows)


def not_finite(losses: dict[str, float]) -> list[str]:
    """Names of the losses that are NaN or infinite."""
    return [name for name, value in losses.items() if not math.isfinite(value)]
