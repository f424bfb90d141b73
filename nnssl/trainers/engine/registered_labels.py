"""Pseudo-labels to begin with: the labels of the labeled cases, registered to each unlabeled one."""

from __future__ import annotations

import hashlib
import math
import os
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnssl.dataloading.cases import unlabeled_folder
from nnssl.dataloading.properties import read_properties
from nnssl.dataset.parallel import default_processes
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.inference.atlases import AtlasOptions, predict_by_atlases
from nnssl.preprocessing.registration import expected_seconds
from nnssl.utils.lock import only_process

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


SHARE_OF_MINUTES = 1 / 3
"""Of the minutes that a user names for a training, what registration may take where nothing else is said."""
_LOOKED_AT = 20


def seconds_per_case(folder: Path, cases: Sequence[str], labeled: int) -> float:
    """Expected of registering so many labeled cases to an unlabeled one of ``cases``, preprocessed in ``folder``."""
    some = cases[:: math.ceil(len(cases) / _LOOKED_AT)]
    shapes = [read_properties(folder / f"{case}.pkl")["shape_before_cropping"] for case in some]
    return labeled * statistics.median(map(expected_seconds, shapes)) / default_processes()


def drawn_by_name(cases: Iterable[str], number: int) -> list[str]:
    """So many of the cases, 0 for all, the same ones each time; fewer are part of more."""
    return sorted(sorted(cases, key=lambda case: hashlib.sha256(case.encode()).digest())[: number or None])


def registered_masks(trainer: SemiSupervisedTrainer, number: int) -> tuple[Path, list[str]]:
    """Masks of so many unlabeled cases of the fold (0: of all), made as ``nnssl_atlas_predict`` does.

    Only the labeled cases that the fold trains on are registered. The folder lies beside the preprocessed data and
    serves every training on the same labeled cases; only what is new or changed is made. Needs the raw data set. Scans
    that cannot be registered, or are no longer in the raw data, are named and left out.

    Returns:
        The folder with the masks, and the cases whose masks it holds.

    Raises:
        UserError: the raw data set or a labeled case is not there, no scan could be registered, or, with a deadline,
            there is no time for it.
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
    unlabeled = trainer.split().unlabeled
    cases = drawn_by_name((case for case in unlabeled if case in raw.unlabeled), number)
    missing = len(unlabeled) - len(set(unlabeled).intersection(raw.unlabeled))
    if missing:
        trainer.print_to_log_file(f"WARNING: {missing} unlabeled cases are not in {raw.folder} and not registered")
    folder = Path(trainer.preprocessed_dataset_folder_base, "registered_labels", _digest(raw, atlases))
    with only_process(folder, "registers labeled cases", wait=True):
        _forget_changed(raw, folder)
        options = AtlasOptions(
            atlases=atlases,
            continue_prediction=True,
            num_processes=default_processes(),
            # the integrity check has refused what is suspicious, or was told to allow it
            allow_suspicious=True,
        )
        done = {case for case in cases if _mask(raw, folder, case).is_file()}
        trainer.print_to_log_file(
            f"Initial pseudo-labels: {len(atlases)} labeled cases are registered to {len(cases) - len(done)} unlabeled "
            f"ones, {len(done)} have been done; see {folder}"
        )
        _refuse_too_long(trainer, [case for case in cases if case not in done], len(atlases))
        scans = [file for case in cases if case not in done for file in raw.unlabeled[case]]
        if scans:
            try:
                report = predict_by_atlases(scans, folder, raw, options)
                trainer.print_to_log_file(f"{len(report.written)} cases registered in {report.seconds / 60:.1f} min")
            except UserError as error:
                done = {case for case in cases if _mask(raw, folder, case).is_file()}
                if not done:
                    raise
                trainer.print_to_log_file(f"WARNING: {len(cases) - len(done)} cases are left out: {error}")
    return folder, [case for case in cases if _mask(raw, folder, case).is_file()]


def _refuse_too_long(trainer: SemiSupervisedTrainer, cases: list[str], labeled: int) -> None:
    """``UserError`` before registering, if that would take all of the time that there is for the training."""
    if trainer.deadline is None or not cases:
        return
    each = seconds_per_case(unlabeled_folder(Path(trainer.preprocessed_dataset_folder)), cases, labeled)
    left = trainer.deadline.planned - time.time()
    if each * len(cases) > left:
        fitting = max(1, int(left * SHARE_OF_MINUTES / each))
        raise UserError(
            "there is no time to register the labeled cases to so many unlabeled ones",
            expected=f"at most {left / 60:.0f} minutes",
            found=f"about {each * len(cases) / 60:.0f} minutes for {len(cases)} cases",
            fix=f"--set registered_cases={fitting} or more --minutes; masks that are made are kept",
        )


def _mask(raw: RawDataset, folder: Path, case: str) -> Path:
    return folder / f"{case}{raw.file_ending}"


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
        mask = _mask(raw, folder, case)
        # a scan may be a link, to which another file was given
        changed = [state.st_mtime_ns for image in images for state in (os.stat(image), os.lstat(image))]
        if mask.is_file() and max(changed) > mask.stat().st_mtime_ns:
            mask.unlink()
