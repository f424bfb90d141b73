"""nnU-Net's loader, sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.label_handling.label_handling import LabelManager


class RowsLoader(nnUNetDataLoader):
    """nnU-Net's loader for some rows of a batch.

    The rows that several of these loaders make, each for its own share, are those that one makes alone: the cases of
    the whole batch are drawn, which rows show foreground for certain is decided by their positions in the whole batch,
    and before a row is drawn its position is announced, for its own seed.

    Args:
        cases: preprocessed cases.
        batch_size: rows of the whole batch.
        initial_patch_size: patch cut from the image, large enough for the spatial transforms.
        patch_size: patch after the transforms.
        label_manager: nnU-Net's.
        rows: positions of the rows to make; all if None.
        options: of nnU-Net's loader.
    """

    def __init__(
        self,
        cases: Any,
        batch_size: int,
        initial_patch_size: Sequence[int] | np.ndarray,
        patch_size: Sequence[int] | np.ndarray,
        label_manager: LabelManager,
        *,
        rows: range | None = None,
        **options: Any,
    ):
        super().__init__(cases, batch_size, initial_patch_size, patch_size, label_manager, **options)
        self.rows = range(batch_size) if rows is None else rows
        self.whole_batch_size = batch_size
        last_percent = [self._oversample_last_XX_percent(row) for row in range(batch_size)]
        probabilistic = options.get("probabilistic_oversampling", False)
        self._show_foreground = self._probabilistic_oversampling if probabilistic else last_percent.__getitem__
        # nnU-Net asks this of every row before it draws anything for it
        self.get_do_oversample = self._begin_row
        self._announce: Callable[[int], None] = _ignore
        self._chosen_share = 0.0
        self._cases: dict[Hashable, Sequence[str]] = {}
        self._probabilities = np.empty(0)
        self._centers: dict[int, Hashable] = {}
        self._position = 0
        self._centered_rows = [] if probabilistic else [row for row in range(batch_size) if last_percent[row]]
        # from here on what nnU-Net allocates
        self.batch_size = len(self.rows)

    def generate_train_batch(self, announce: Callable[[int], None] | None = None) -> dict[str, Any]:
        """nnU-Net's batch of these rows; ``announce`` is called with the position of each before it is drawn."""
        self._announce = announce or _ignore
        return super().generate_train_batch()

    @property
    def centered_share(self) -> float:
        """Share of the rows of the whole batch that show foreground for certain."""
        return len(self._centered_rows) / self.whole_batch_size

    def center_on(self, share: float, probabilities: np.ndarray, cases: Mapping[Hashable, Sequence[str]]) -> None:
        """From now on, of the rows that show foreground for certain, ``share`` is centered on classes drawn so.

        Args:
            share: 0 to 1.
            probabilities: of the classes, in the order of ``cases``.
            cases: those that have a class, by what nnU-Net keeps locations of; one of them is drawn evenly.
        """
        self._chosen_share, self._probabilities, self._cases = share, probabilities, dict(cases)

    def get_indices(self) -> list[str]:
        """Case names of these rows."""
        cases = self.draw_cases()
        return [cases[row] for row in self.rows]

    def draw_cases(self) -> list[str]:
        """Case names of the whole batch, alike for all who make some of its rows."""
        drawn = np.random.choice(self.indices, self.whole_batch_size, replace=True, p=self.sampling_probabilities)
        cases = list(drawn)
        self._centers = {}
        for row in self._centered_rows if self._chosen_share > 0 else ():
            if np.random.uniform() < self._chosen_share:
                chosen = np.random.choice(len(self._cases), p=self._probabilities)
                self._centers[row] = list(self._cases)[chosen]
                having = self._cases[self._centers[row]]
                cases[row] = having[np.random.choice(len(having))]
        return cases

    def get_bbox(
        self,
        data_shape: Any,
        force_fg: bool,
        class_locations: dict | None,
        overwrite_class: Any = None,
        verbose: bool = False,
    ) -> tuple[list[int], list[int]]:
        """nnU-Net's, around the class that was drawn for this row if any."""
        if force_fg and overwrite_class is None:
            overwrite_class = self._centers.get(self._position)
        return super().get_bbox(data_shape, force_fg, class_locations, overwrite_class, verbose)

    def _begin_row(self, index: int) -> bool:
        self._position = self.rows[index]
        self._announce(self._position)
        return self._show_foreground(self._position)


def count_uniform_rows(batch_size: int, oversample_foreground_percent: float) -> int:
    """Rows of a batch, always the first ones, that nnU-Net places without looking for foreground."""
    batch: Any = SimpleNamespace(batch_size=batch_size, oversample_foreground_percent=oversample_foreground_percent)
    forced = [nnUNetDataLoader._oversample_last_XX_percent(batch, row) for row in range(batch_size)]
    return forced.count(False)


def _ignore(position: int) -> None:
    """Nobody needs to know."""
