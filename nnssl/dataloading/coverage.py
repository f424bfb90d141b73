"""How often the patches of the labeled stream show each class, and how to draw them so that none is rare.

nnU-Net centers a share of the patches on a class that it chooses evenly among those of the case. A class that few of
the labeled cases have, or one of very many classes, may then hardly be seen in a short training.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from scipy.optimize import linprog

from nnssl.dataloading.rows import Pair, RowsLoader

_MOST_PATCHES = 1000


@dataclass(frozen=True)
class Coverage:
    """Shares of patches that show classes, estimated from patches before augmentation.

    Attributes:
        classes: names of what nnU-Net keeps locations of: label values, or tuples of them for regions.
        pairs: what a patch can be centered on.
        usual: ``(P,)`` probabilities with which nnU-Net chooses the pairs.
        centered: ``(P, K)`` share of the patches centered on a pair that show a class.
        uniform: ``(K,)`` share of uniformly placed patches that show a class.
        centered_share: share of patches that are centered on a class.
    """

    classes: list[Hashable]
    pairs: list[Pair]
    usual: np.ndarray
    centered: np.ndarray
    uniform: np.ndarray
    centered_share: float

    def shares(self, probabilities: np.ndarray) -> np.ndarray:
        """``(K,)`` share of all patches that show a class, if pairs are chosen with these probabilities."""
        return self.centered_share * probabilities @ self.centered + (1 - self.centered_share) * self.uniform

    def balanced(self, least: float) -> tuple[float, np.ndarray] | None:
        """How to show every class in a share of at least ``least`` of the patches, changing as little as possible.

        Returns:
            ``(share, probabilities)``: this share of the centered patches is to be centered on pairs drawn with the
            probabilities ``(P,)``, the rest as nnU-Net does. The probabilities are those by which the class that is
            shown least is shown most often (a linear program); where no choice suffices, the share is 1. None if
            nnU-Net's choice suffices, or if nothing can be done. Classes that no case has are left out.
        """
        known = (self.centered > 0).any(0) | (self.uniform > 0)
        before = self.shares(self.usual)[known]
        if self.centered_share == 0 or not known.any() or before.min() >= least:
            return None
        pairs = len(self.pairs)
        # maximize t under t - share of each class <= 0
        limits = np.hstack([-self.centered_share * self.centered[:, known].T, np.ones((known.sum(), 1))])
        solution = linprog(
            np.r_[np.zeros(pairs), -1.0],
            A_ub=limits,
            b_ub=(1 - self.centered_share) * self.uniform[known],
            A_eq=np.r_[np.ones(pairs), 0.0][None],
            b_eq=[1.0],
        )
        if not solution.success:
            raise RuntimeError(f"no balance of classes: {solution.message}")
        most = np.clip(solution.x[:-1], 0, None)
        most /= most.sum()
        gain = self.shares(most)[known] - before
        missing = least - before
        needed = missing[missing > 0] / np.maximum(gain[missing > 0], 1e-12)
        return min(1.0, float(needed.max())), most


def estimate_coverage(loader: RowsLoader, classes: list[Hashable], *, most_cases: int = 20) -> Coverage:
    """Places patches as ``loader`` does and looks at what they show; draws from NumPy's global generator.

    Args:
        loader: of the labeled cases, with the final patch size.
        classes: label values, or tuples of them for regions.
        most_cases: of more cases, this many are drawn.
    """
    identifiers = list(loader.indices)
    if len(identifiers) > most_cases:
        identifiers = sorted(np.random.choice(identifiers, most_cases, replace=False).tolist())
    # per case and class
    draws = max(2, min(8, _MOST_PATCHES // (len(identifiers) * (len(classes) + 1))))
    pairs: list[Pair] = []
    usual, centered, uniform = [], [], []
    for identifier in identifiers:
        _, segmentation, _, properties = loader._data.load_case(identifier)
        segmentation = np.asarray(segmentation[:])
        locations = properties["class_locations"]
        uniform += [_shown(p, classes) for p in _patches(loader, segmentation, locations, None, draws)]
        present = [name for name in classes if len(locations.get(name, ())) > 0] or [None]
        for name in present:
            pairs.append((identifier, name))
            usual.append(1 / len(identifiers) / len(present))
            drawn = _patches(loader, segmentation, locations, name, draws)
            centered.append(np.mean([_shown(patch, classes) for patch in drawn], 0))
    return Coverage(classes, pairs, np.array(usual), np.array(centered), np.mean(uniform, 0), loader.centered_share)


def _patches(
    loader: RowsLoader, segmentation: np.ndarray, locations: dict[Any, Any], name: Hashable, draws: int
) -> Iterator[np.ndarray]:
    for _ in range(draws):
        lower, upper = loader.get_bbox(segmentation.shape[1:], name is not None, locations, overwrite_class=name)
        yield crop_and_pad_nd(segmentation, [[a, b] for a, b in zip(lower, upper, strict=True)], -1)


def _shown(patch: np.ndarray, classes: list[Hashable]) -> np.ndarray:
    # by far faster than a sort
    present = set(np.flatnonzero(np.bincount(patch.clip(0).ravel())).tolist())
    return np.array([bool(present.intersection(c if isinstance(c, tuple) else (c,))) for c in classes], float)
