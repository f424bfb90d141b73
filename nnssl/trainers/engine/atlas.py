"""Augmentation of the labeled stream by pairs of labeled cases (atlases)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl.augmentation.regional_switch import RegionalSwitch
from nnssl.dataloading.atlas_pairs import AtlasPairsLoader
from nnssl.dataloading.correspondence import Correspondence, Frame, Kind
from nnssl.dataloading.mixed_pairs import ForegroundBoxes, MixedPairsLoader
from nnssl.dataloading.pseudo_labeled import PseudoLabeledCases
from nnssl.dataloading.rows import RowsLoader
from nnssl.preprocessing.alignment import load_frames

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def settle_correspondence(trainer: SemiSupervisedTrainer) -> None:
    """Puts the decision of the plan where a hyper-parameter would be, so that a continued training keeps it."""
    if trainer.atlas_augmentation != "none" and trainer.atlas_correspondence is None:
        planned = trainer.configuration_manager.configuration.get("semi_supervised", {})
        trainer.atlas_correspondence = planned.get("atlas_correspondence", "relative")


def labeled_loader_class(trainer: SemiSupervisedTrainer) -> Any:
    """What makes the labeled batches of the training: `RowsLoader`, or `AtlasPairsLoader` as the run is set."""
    if trainer.atlas_augmentation == "none":
        return RowsLoader
    return _pairs_loader(trainer, AtlasPairsLoader, _frames(trainer, trainer.atlas_correspondence or "relative"))


def mixed_loader_class(trainer: SemiSupervisedTrainer, pseudo_labeled: PseudoLabeledCases) -> Any:
    """What makes batches of labeled and pseudo-labeled cases.

    Only labeled cases are registered: where the plan goes by registration, the foreground boxes are taken.
    """
    if trainer.atlas_correspondence in (None, "relative"):
        return _pairs_loader(trainer, MixedPairsLoader, {})
    return _pairs_loader(trainer, MixedPairsLoader, ForegroundBoxes(_frames(trainer, "bbox"), pseudo_labeled))


def _frames(trainer: SemiSupervisedTrainer, kind: Kind) -> Mapping[str, Frame]:
    folder = Path(trainer.preprocessed_dataset_folder_base)
    return load_frames(folder, kind, trainer.split().train, trainer.plans_manager.transpose_forward)


def _pairs_loader(trainer: SemiSupervisedTrainer, loader: type[AtlasPairsLoader], frames: Mapping[str, Frame]) -> Any:
    switch = RegionalSwitch(trainer.switch_probability, trainer.switch_boxes, trainer.switch_edges)  # type: ignore[arg-type]
    return partial(loader, switch=switch, correspondence=Correspondence(frames))
