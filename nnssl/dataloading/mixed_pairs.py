"""Training rows made in pairs of a labeled and a pseudo-labeled case, which exchange the content of random boxes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from nnssl.dataloading.atlas_pairs import AtlasPairsLoader
from nnssl.dataloading.correspondence import Frame
from nnssl.dataloading.pseudo_labeled import PseudoLabeledCases


class PairedCases(PseudoLabeledCases):
    """Pseudo-labeled cases that are to be mixed with labeled ones, in place of a stream of their own."""


class MixedCases:
    """Pseudo-labeled cases, and the labeled ones that each of them is paired with.

    Has the form of nnU-Net's labeled data sets; its ``identifiers`` are the pseudo-labeled cases.

    Args:
        labeled: nnU-Net's data set of the labeled cases.
        pseudo_labeled: cases without a name in common with them.
    """

    def __init__(self, labeled: Any, pseudo_labeled: PseudoLabeledCases):
        self.labeled = labeled
        self.pseudo_labeled = pseudo_labeled
        self.identifiers = list(pseudo_labeled.identifiers)
        self._with_labels = frozenset(labeled.identifiers)

    def is_labeled(self, identifier: str) -> bool:
        return identifier in self._with_labels

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Image, segmentation, that of an earlier stage or None, and properties."""
        return (self.labeled if self.is_labeled(identifier) else self.pseudo_labeled).load_case(identifier)


class ForegroundBoxes(Mapping[str, Frame]):
    """Frames of the foreground boxes of labeled and pseudo-labeled cases; those of the latter are read when needed.

    Args:
        labeled: frames of the labeled cases.
        pseudo_labeled: the others.
    """

    def __init__(self, labeled: Mapping[str, Frame], pseudo_labeled: PseudoLabeledCases):
        self.labeled = labeled
        self.pseudo_labeled = pseudo_labeled

    def __getitem__(self, case: str) -> Frame:
        if case in self.labeled:
            return self.labeled[case]
        return Frame.of_box(self.pseudo_labeled.pseudo_labels.box(case))

    def __iter__(self) -> Iterator[str]:
        return iter([*self.labeled, *self.pseudo_labeled.identifiers])

    def __len__(self) -> int:
        return len(self.labeled) + len(self.pseudo_labeled.identifiers)


class MixedPairsLoader(AtlasPairsLoader):
    """Rows 2k and 2k + 1 are a labeled and a pseudo-labeled patch at corresponding positions, switched or as they are.

    The pseudo-labeled case leads, except where a labeled one was drawn to show a rare class.

    Args:
        cases: `MixedCases`.
        arguments: further ones of `AtlasPairsLoader`.
        options: of `AtlasPairsLoader`.

    Raises:
        ValueError: there is no labeled or no pseudo-labeled case.
    """

    has_ignore: bool

    def __init__(self, cases: Any, *arguments: Any, **options: Any):
        super().__init__(cases, *arguments, **options)
        self._annotated_in_part: bool = self.has_ignore

    def check_cases(self) -> None:
        if not (self.indices and self._data.labeled.identifiers):
            raise ValueError("a pair needs a labeled and a pseudo-labeled case")

    def partner(self, leader: str, drawn: str) -> str:
        pool = self.indices if self._data.is_labeled(leader) else self._data.labeled.identifiers
        return pool[np.random.choice(len(pool))]

    def get_bbox(self, data_shape: Any, *arguments: Any, **options: Any) -> tuple[list[int], list[int]]:
        # with an ignore label nnU-Net centers patches on annotated voxels; predictions ignore none
        self.has_ignore = self._annotated_in_part and self._data.is_labeled(self.pair.leader)
        return super().get_bbox(data_shape, *arguments, **options)
