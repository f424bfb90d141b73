"""No class is silently unseen: how patches are centered, and what is said of classes that stay rare."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING

import numpy as np
import torch

from nnssl.dataloading.coverage import Balance, Coverage, estimate_coverage
from nnssl.dataloading.rows import RowsLoader
from nnssl.dataloading.streams import own_generators, seed_generators
from nnssl.losses.labels import WeightedCrossEntropy
from nnssl.trainers.engine.shared_loss import dice_and_cross_entropy
from nnssl.trainers.engine.validation import validation_cases

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

_STREAM = int.from_bytes(b"coverage", "little")


def balance_classes(trainer: SemiSupervisedTrainer, loader: RowsLoader, probe: RowsLoader) -> None:
    """Centers the patches of ``loader`` such that each class is in ``least_class_share`` of them, and says so.

    Args:
        trainer: whose hyper-parameter that is; 0 leaves nnU-Net's choice and looks at nothing.
        loader: of the training stream.
        probe: the same with the final patch size, for looking at patches.
    """
    least = trainer.least_class_share
    if least == 0:
        return
    coverage, known = trainer.coverage, trainer.coverage is not None
    if coverage is None:
        with own_generators():
            seed_generators(trainer.seed, _STREAM)
            coverage = trainer.coverage = estimate_coverage(probe, _classes(trainer))
    balance = coverage.balanced(least)
    if balance is not None:
        loader.center_on(balance.share, balance.probabilities, coverage.cases)
    if not known:  # streams are opened again in a training of several phases
        _tell(trainer, coverage, balance)


def weigh_classes(trainer: SemiSupervisedTrainer) -> None:
    """Gives the cross entropy of the loss its weights of classes, if `rare_class_power` asks for them."""
    if trainer.rare_class_power > 0 and not trainer.label_manager.has_regions:  # a setting that is refused later
        inner = dice_and_cross_entropy(trainer.loss)
        weights = class_weights(trainer, trainer.rare_class_power).to(trainer.device)
        inner.ce = WeightedCrossEntropy(weights, inner.ce.ignore_index)


def class_weights(trainer: SemiSupervisedTrainer, power: float, *, most_cases: int = 50) -> torch.Tensor:
    """Weights of the classes ``(K,)`` by their shares of the labeled voxels of the fold, ``share ** -power``.

    In proportion only: a labeled voxel weighs 1 on average. A class that no voxel has weighs as much as the rarest one.

    Args:
        trainer: with classes, not regions; background comes first, as in its logits.
        power: how much more rare classes weigh, 1 gives all classes the same sum of weights.
        most_cases: of more cases, this many are looked at.
    """
    labels, cases = trainer.label_manager.all_labels, sorted(trainer.split().train)
    dataset = validation_cases(trainer, cases)

    def counted() -> list[int]:
        found = np.zeros(len(labels), np.int64)
        for case in cases[:: math.ceil(len(cases) / most_cases)]:
            segmentation = np.asarray(dataset.load_case(case)[1][:])
            # -1 marks what lies outside of the nonzero region, background like the rest of it
            found += np.bincount(segmentation.clip(0).ravel(), minlength=max(labels) + 2)[labels]
        return [int(count) for count in found]

    shares = torch.tensor(trainer.ranks.from_main(counted), dtype=torch.float64)
    shares /= shares.sum()
    weights = shares.clamp_min(shares[shares > 0].min()) ** -power
    return (weights / (weights * shares).sum()).float()


def _tell(trainer: SemiSupervisedTrainer, coverage: Coverage, balance: Balance | None) -> None:
    least = trainer.least_class_share
    names = [_name(trainer, c) for c in coverage.cases]
    before, after = coverage.shares(), coverage.shares(balance)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in zip(names, after, strict=True))
    trainer.print_to_log_file(f"Labeled patches that show a class: {shares}", also_print_to_console=False)
    if balance is not None:
        changes = ", ".join(
            f"{name} {a:.1%} (nnU-Net's choice: {b:.1%})"
            for name, a, b in zip(names, after, before, strict=True)
            if b < least and a > 0
        )
        trainer.print_to_log_file(f"Patches are centered such that rare classes are shown more often: {changes}")
    for name, share, cases in zip(names, after, coverage.cases.values(), strict=True):
        if not cases:
            trainer.print_to_log_file(f"WARNING: no labeled case of this fold has class {name}: it cannot be learned")
        elif share < 0.99 * least:
            trainer.print_to_log_file(
                f"WARNING: class {name} is in {share:.1%} of the labeled patches only; it is shown more often with a "
                f"larger --set oversample_foreground_percent (now {trainer.oversample_foreground_percent:g})"
            )


def _classes(trainer: SemiSupervisedTrainer) -> list[Hashable]:
    """What nnU-Net keeps locations of: label values, or regions as tuples."""
    manager = trainer.label_manager
    if not manager.has_regions:
        return list(manager.foreground_labels)
    return [tuple(region) if isinstance(region, (list, tuple)) else region for region in manager.foreground_regions]


def _name(trainer: SemiSupervisedTrainer, wanted: Hashable) -> str:
    values = wanted if isinstance(wanted, tuple) else (wanted,)
    for name, value in trainer.dataset_json["labels"].items():
        if (tuple(value) if isinstance(value, list) else (value,)) == values:
            return str(name)
    return str(wanted)
