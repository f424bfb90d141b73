"""Pseudo-labels to begin with: the labels of the labeled cases, registered to each unlabeled one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl.dataset.parallel import default_processes
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.inference.atlases import AtlasOptions, predict_by_atlases
from nnssl.utils.lock import only_process

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


def cases_to_register(trainer: SemiSupervisedTrainer, number: int) -> list[str]:
    """So many unlabeled cases of the fold, 0 for all: drawn by their names, fewer being part of more."""
    cases = sorted(trainer.split().unlabeled)
    drawn = sorted(cases, key=lambda case: hashlib.sha256(case.encode()).digest())
    return sorted(drawn[: number or None])


def registered_masks(trainer: SemiSupervisedTrainer, cases: Sequence[str]) -> Path:
    """Folder with a mask of each of these unlabeled cases, made as ``nnssl_atlas_predict`` does.

    Only the labeled cases that the fold trains on are registered. The folder lies beside the preprocessed data and
    serves every training on the same labeled cases; only what is new or changed is made. Needs the raw data set.

    Raises:
        UserError: the raw data set or a labeled case is not there, or some scans could not be segmented; the others
            are kept.
    """
    raw = RawDataset.open(trainer.plans_manager.dataset_name)
    atlases = tuple(sorted(trainer.split().train))
    gone = [case for case in atlases if case not in raw.labeled]
    if gone:
        raise UserError(
            "labeled cases of the fold are not in the raw data set",
            where=raw.folder,
            found=", ".join(gone),
            fix=f"bring them back, or run nnssl_plan_and_preprocess -d {raw.name} again",
        )
    scans = [file for case in cases for file in raw.unlabeled.get(case, ())]
    folder = Path(trainer.preprocessed_dataset_folder_base, "registered_labels", _digest(raw, atlases))
    with only_process(folder, "registers labeled cases"):
        _forget_changed(raw, folder)
        options = AtlasOptions(atlases=atlases, continue_prediction=True, num_processes=default_processes())
        report = predict_by_atlases(scans, folder, raw, options)
    trainer.print_to_log_file(
        f"Initial pseudo-labels: {len(atlases)} labeled cases registered to {len(report.written)} unlabeled ones in "
        f"{report.seconds / 60:.1f} min, {len(report.skipped)} had been done; see {folder}"
    )
    return folder


def _digest(raw: RawDataset, atlases: tuple[str, ...]) -> str:
    """Another one if another case is labeled, or a file of one was changed."""
    facts = [(case, *_state(raw.labeled[case].label), *map(_state, raw.labeled[case].images)) for case in atlases]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _state(file: str) -> tuple[int, int]:
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns


def _forget_changed(raw: RawDataset, folder: Path) -> None:
    """Removes masks that are older than their scans."""
    for case, images in raw.unlabeled.items():
        mask = folder / f"{case}{raw.file_ending}"
        # a scan may be a link, to which another file was given
        changed = [state.st_mtime_ns for image in images for state in (os.stat(image), os.lstat(image))]
        if mask.is_file() and max(changed) > mask.stat().st_mtime_ns:
            mask.unlink()
