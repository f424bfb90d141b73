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

from nnssl.dataloading.rows import RowsLoader

_MOST_PATCHES = 1000
# a gain below this share of what is missing is lost in the noise of the estimate
_LEAST_GAIN = 0.2


@dataclass(frozen=True)
class Balance:
    """How centered patches are to be drawn.

    Attributes:
        share: of the centered patches; the rest is centered as nnU-Net does.
        probabilities: ``(K,)`` of the classes on which that share is centered, in any case that has the class.
    """

    share: float
    probabilities: np.ndarray


@dataclass(frozen=True)
class Coverage:
    """Shares of patches that show classes, estimated from patches before augmentation.

    Attributes:
        cases: for each class, by what nnU-Net keeps locations of (label values, or tuples of them for regions), the
            labeled cases that have it.
        usual: ``(K,)`` probabilities with which nnU-Net centers on the classes.
        centered: ``(K, K)`` share of the patches centered on a class that show another.
        uniform: ``(K,)`` share of uniformly placed patches that show a class.
        centered_share: share of patches that are centered on a class.
    """

    cases: dict[Hashable, list[str]]
    usual: np.ndarray
    centered: np.ndarray
    uniform: np.ndarray
    centered_share: float

    def shares(self, balance: Balance | None = None) -> np.ndarray:
        """``(K,)`` share of all patches that show a class, by nnU-Net's choice or with a balance."""
        chosen = self.usual
        if balance is not None:
            chosen = (1 - balance.share) * self.usual + balance.share * balance.probabilities
        return self.centered_share * chosen @ self.centered + (1 - self.centered_share) * self.uniform

    def balanced(self, least: float) -> Balance | None:
        """How to show every class in a share of at least ``least`` of the patches, changing as little as possible.

        The probabilities are those by which the class that is shown least is shown most often (a linear program), and
        their share is as small as suffices. None if nnU-Net's choice suffices, or if no other choice is clearly
        better. Classes that no case has are left out.
        """
        known = np.array([bool(cases) for cases in self.cases.values()])
        before = self.shares()[known]
        if self.centered_share == 0 or not known.any() or before.min() >= least:
            return None
        most = Balance(1.0, self._most_even(known))
        gain = self.shares(most)[known] - before
        if before.min() + _LEAST_GAIN * (least - before.min()) > self.shares(most)[known].min():
            return None
        missing = least - before
        needed = missing[missing > 0] / np.maximum(gain[missing > 0], 1e-12)
        return Balance(min(1.0, float(needed.max())), most.probabilities)

    def _most_even(self, known: np.ndarray) -> np.ndarray:
        count = int(known.sum())
        # maximize t under t - share of each class <= 0
        solution = linprog(
            np.r_[np.zeros(count), -1.0],
            A_ub=np.hstack([-self.centered_share * self.centered[np.ix_(known, known)].T, np.ones((count, 1))]),
            b_ub=(1 - self.centered_share) * self.uniform[known],
            A_eq=np.r_[np.ones(count), 0.0][None],
            b_eq=[1.0],
        )
        if not solution.success:
            raise RuntimeError(f"no balance of classes: {solution.message}")
        probabilities = np.zeros(len(known))
        probabilities[known] = np.clip(solution.x[:-1], 0, None)
        return probabilities / probabilities.sum()


def estimate_coverage(loader: RowsLoader, classes: list[Hashable], *, most_cases: int = 20) -> Coverage:
    """Places patches as ``loader`` does and looks at what they show; draws from NumPy's global generator.

    Which cases have which classes is known from all of them; patches are placed in some.

    Args:
        loader: of the labeled cases, with the final patch size.
        classes: label values, or tuples of them for regions.
        most_cases: of more cases, this many are drawn, such that every class is in one of them.
    """
    identifiers = list(loader.indices)
    present = {identifier: _classes_of(loader, identifier, classes) for identifier in identifiers}
    cases = {name: [i for i in identifiers if name in present[i]] for name in classes}
    usual = np.array([sum(1 / len(present[i]) for i in cases[name]) for name in classes]) / len(identifiers)
    looked_at = _cover(identifiers, cases, most_cases)
    # per case and class
    draws = max(2, min(8, _MOST_PATCHES // (len(looked_at) * (len(classes) + 1))))
    uniform: list[np.ndarray] = []
    centered: dict[Hashable, list[np.ndarray]] = {name: [] for name in classes}
    for identifier in looked_at:
        _, segmentation, _, properties = loader._data.load_case(identifier)
        segmentation = np.asarray(segmentation[:])
        locations = properties["class_locations"]
        uniform += [_shown(patch, classes) for patch in _patches(loader, segmentation, locations, None, draws)]
        for name in present[identifier]:
            centered[name] += [_shown(p, classes) for p in _patches(loader, segmentation, locations, name, draws)]
    nothing = np.zeros((1, len(classes)))
    means = np.array([np.mean(centered[name] or nothing, 0) for name in classes])
    return Coverage(cases, usual, means, np.mean(uniform, 0), loader.centered_share)


def _classes_of(loader: RowsLoader, identifier: str, classes: list[Hashable]) -> list[Hashable]:
    locations = loader._data.load_case(identifier)[3]["class_locations"]
    return [name for name in classes if len(locations.get(name, ())) > 0]


def _cover(identifiers: list[str], cases: dict[Hashable, list[str]], most: int) -> list[str]:
    """``most`` cases, of which one has each class, the rest drawn at random; more if there are more rare classes."""
    if len(identifiers) <= most:
        return identifiers
    chosen: dict[str, None] = {}
    for having in sorted(cases.values(), key=len):
        if having and chosen.keys().isdisjoint(having):
            chosen[having[np.random.choice(len(having))]] = None
    rest = [identifier for identifier in identifiers if identifier not in chosen]
    missing = max(0, most - len(chosen))
    return [*chosen, *np.random.choice(rest, missing, replace=False).tolist()]


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
