"""Augmentation of the labeled stream by pairs of labeled cases (atlases)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl.augmentation.regional_switch import RegionalSwitch
from nnssl.dataloading.atlas_pairs import AtlasPairsLoader
from nnssl.dataloading.correspondence import Correspondence
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
    switch = RegionalSwitch(trainer.switch_probability, trainer.switch_boxes, trainer.switch_edges)  # type: ignore[arg-type]
    kind = trainer.atlas_correspondence or "relative"
    folder = Path(trainer.preprocessed_dataset_folder_base)
    axes = trainer.plans_manager.transpose_forward
    correspondence = Correspondence(load_frames(folder, kind, trainer.split().train, axes))
    return partial(AtlasPairsLoader, switch=switch, correspondence=correspondence)
