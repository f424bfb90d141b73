"""The streams of a training: labeled, unlabeled and validation patches."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnssl.dataloading.cases import NamedErrors, UnlabeledCases, unlabeled_folder, unlabeled_identifiers
from nnssl.dataloading.mixed_pairs import MixedCases, PairedCases
from nnssl.dataloading.properties import vet_properties
from nnssl.dataloading.pseudo_labeled import PseudoLabeledCases, PseudoLabeledLoader
from nnssl.dataloading.rows import RowsLoader
from nnssl.dataloading.streams import BatchStream, SeededBatches
from nnssl.dataloading.targets import AppendTargets, split_targets
from nnssl.dataloading.unlabeled import UnlabeledLoader
from nnssl.dataset.splits import Fold, load_fold
from nnssl.errors import UserError
from nnssl.trainers.engine.atlas import labeled_loader_class, mixed_loader_class
from nnssl.trainers.engine.class_balance import balance_classes

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


class TrainingStream:
    """Labeled and unlabeled batches together, and the time that was spent waiting for them.

    Yields nnU-Net's ``{"data", "target", "keys"}`` plus ``"unlabeled"`` (``(B_u, C, *P)`` or None) and
    ``"pseudo_target"`` (what ``"target"`` is for the labeled patches, or None); ``"extra"`` has the method's further
    targets, if it has any.

    Args:
        labeled: batches as nnU-Net's loader makes them.
        unlabeled: batches of `UnlabeledLoader`, None for methods that use none.
        targets: names of the method's further targets.
        labeled_only: number of steps to come that need no unlabeled batch; ``unlabeled`` starts after them.

    Attributes:
        waited: seconds by stream since `restart_clock`.
    """

    def __init__(self, labeled: BatchStream, unlabeled: BatchStream | None, targets: list[str], labeled_only: int = 0):
        self.labeled = labeled
        self.unlabeled = unlabeled
        self.targets = targets
        self.labeled_only = labeled_only
        self.restart_clock()

    def restart_clock(self) -> None:
        self.waited = {"labeled": 0.0, "unlabeled": 0.0}

    def __next__(self) -> dict[str, Any]:
        batch = self._next("labeled", self.labeled)
        split_targets(batch, self.targets)
        unlabeled: dict[str, Any] = {}
        if self.labeled_only > 0:
            self.labeled_only -= 1
        elif self.unlabeled is not None:
            unlabeled = self._next("unlabeled", self.unlabeled)
        return batch | {"unlabeled": unlabeled.get("data"), "pseudo_target": unlabeled.get("target")}

    def _next(self, name: str, stream: BatchStream) -> dict[str, Any]:
        start = time.perf_counter()
        batch = next(stream)
        self.waited[name] += time.perf_counter() - start
        return batch

    def close(self) -> None:
        self.labeled.close()
        if self.unlabeled is not None:
            self.unlabeled.close()


def open_streams(trainer: SemiSupervisedTrainer) -> tuple[TrainingStream, BatchStream]:
    """Training and validation streams, both at the position where the training stands.

    Each rank makes its own rows of the batches that one process would make alone.
    """
    patch_size = trainer.configuration_manager.patch_size
    geometry = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    rotation, dummy_2d, initial_patch_size, mirror_axes = geometry
    scales = trainer._get_deep_supervision_scales()
    masked = trainer.configuration_manager.use_mask_for_norm
    manager = trainer.label_manager
    labels = {
        "is_cascaded": trainer.is_cascaded,
        "foreground_labels": manager.foreground_labels,
        "regions": manager.foreground_regions if manager.has_regions else None,
        "ignore_label": manager.ignore_label,
    }
    workers = worker_counts(trainer)
    ranks = trainer.ranks

    def stream(name: str, source: Any, start: int) -> BatchStream:
        batches = SeededBatches(source, name, trainer.seed)
        return BatchStream(batches, start, workers[name], pin_memory=trainer.device.type == "cuda")

    def labeled_loader(
        cases: Any,
        size: Any,
        transforms: BasicTransform | None,
        patches: int = trainer.batch_size,
        kind: Any = RowsLoader,
    ) -> RowsLoader:
        return kind(
            NamedErrors(cases),
            patches * ranks.size,
            size,
            patch_size,
            manager,
            rows=ranks.rows(patches),
            oversample_foreground_percent=trainer.oversample_foreground_percent,
            transforms=transforms,
            probabilistic_oversampling=trainer.probabilistic_oversampling,
        )

    def training_transforms(**options: Any) -> BasicTransform:
        transforms = trainer.get_training_transforms(
            patch_size, rotation, options.pop("scales"), mirror_axes, dummy_2d, use_mask_for_norm=masked, **options
        )
        if trainer.settings.deterministic:
            _fix_algorithms(transforms)
        return transforms

    training_cases, validation_cases = trainer.get_tr_and_val_datasets()
    targets = trainer.extra_targets()
    labeled_transforms = training_transforms(scales=scales, **labels)
    if targets:
        labeled_transforms = ComposeTransforms([labeled_transforms, AppendTargets(targets)])
    unlabeled, unlabeled_source = None, trainer.unlabeled_cases()
    cases, kind = training_cases, labeled_loader_class(trainer)
    if isinstance(unlabeled_source, PairedCases):
        cases, kind = MixedCases(training_cases, unlabeled_source), mixed_loader_class(trainer, unlabeled_source)
        unlabeled_source = None
    loader = labeled_loader(cases, initial_patch_size, labeled_transforms, kind=kind)
    balance_classes(trainer, loader, labeled_loader(training_cases, patch_size, None))
    labeled = stream("labeled", loader, trainer.iteration)
    unlabeled_loader: RowsLoader | None = None
    if isinstance(unlabeled_source, PseudoLabeledCases):
        transforms = training_transforms(scales=scales, **labels)
        patches = trainer.num_unlabeled
        unlabeled_loader = labeled_loader(
            unlabeled_source, initial_patch_size, transforms, patches, PseudoLabeledLoader
        )
    elif unlabeled_source is not None:
        unlabeled_loader = UnlabeledLoader(
            NamedErrors(unlabeled_source),  # type: ignore[arg-type]
            trainer.num_unlabeled * ranks.size,
            initial_patch_size,
            patch_size,
            manager,
            training_transforms(scales=None),
            ranks.rows(trainer.num_unlabeled),
        )
    if unlabeled_loader is not None:
        unlabeled = stream("unlabeled", unlabeled_loader, max(trainer.iteration, trainer.pretrain_steps))
    validation_transforms = trainer.get_validation_transforms(scales, **labels)
    validation_loader = labeled_loader(validation_cases, patch_size, validation_transforms)
    start = trainer.current_epoch * trainer.num_val_iterations_per_epoch
    training = TrainingStream(labeled, unlabeled, list(targets), max(0, trainer.pretrain_steps - trainer.iteration))
    return training, stream("validation", validation_loader, start)


def unlabeled_images(trainer: SemiSupervisedTrainer) -> UnlabeledCases:
    """The unlabeled cases of the fold; with their nonzero masks if normalization keeps the outside at zero."""
    folder = unlabeled_folder(trainer.preprocessed_dataset_folder)
    masked = any(trainer.configuration_manager.use_mask_for_norm or ())
    return UnlabeledCases(folder, trainer.split().unlabeled, with_mask=masked)


def worker_counts(trainer: SemiSupervisedTrainer) -> dict[str, int]:
    """Worker processes of each stream.

    ``nnUNet_n_proc_DA`` (0: all in the main process) is shared between the streams by their batch sizes. Where it is
    not set, a training on a CPU has one worker per stream: it keeps up, and more would take cores from the step.
    """
    total = get_allowed_n_proc_DA()
    if total == 0:
        return {"labeled": 0, "unlabeled": 0, "validation": 0}
    if trainer.device.type == "cpu" and "nnUNet_n_proc_DA" not in os.environ:
        return {"labeled": 1, "unlabeled": 1, "validation": 1}
    patches = trainer.batch_size + trainer.num_unlabeled
    labeled = max(1, round(total * trainer.batch_size / patches))
    return {"labeled": labeled, "unlabeled": max(1, total - labeled), "validation": max(1, total // 4)}


def _fix_algorithms(transforms: Any) -> None:
    """Switches off the choice of algorithms by timing, which changes the last bits from run to run."""
    if hasattr(transforms, "benchmark"):
        transforms.benchmark = False
    children: Iterable[Any] = getattr(transforms, "transforms", [])
    for child in [*children, getattr(transforms, "transform", None)]:
        if child is not None:
            _fix_algorithms(child)


def split_of(trainer: SemiSupervisedTrainer) -> Fold:
    """Cases of the trainer's fold; ``UserError`` if its configuration is not preprocessed."""
    folder = trainer.preprocessed_dataset_folder
    if folder is None or not Path(folder).is_dir():
        raise UserError(
            f"configuration {trainer.configuration_name} is not preprocessed",
            where=folder,
            fix=f"nnssl_plan_and_preprocess -d {trainer.plans_manager.dataset_name} -c {trainer.configuration_name}",
        )
    from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

    labeled = infer_dataset_class(folder).get_identifiers(folder)
    unlabeled = unlabeled_identifiers(unlabeled_folder(folder))
    splits_file = Path(nnUNet_preprocessed, trainer.plans_manager.dataset_name, "splits_final.json")
    fold = load_fold(splits_file, trainer.fold, sorted(labeled), unlabeled)
    vet_properties(folder, dict.fromkeys((*fold.train, *fold.val)))
    return fold
