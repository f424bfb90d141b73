"""Evaluation of a folder of predictions against a folder of reference labels."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnssl.dataset.groups import name_some
from nnssl.dataset.parallel import default_processes, map_cases
from nnssl.errors import UserError
from nnssl.evaluation.cases import CaseResult, CaseTask, evaluate_case
from nnssl.evaluation.labels import EvaluationLabels, find_dataset_json, read_dataset_json
from nnssl.evaluation.results import Evaluation, collect

Folder = str | os.PathLike[str]


@dataclass(frozen=True)
class FolderPair:
    """Predictions and reference labels that have been matched, and how they are compared: an evaluation in two steps.

    Attributes:
        tasks: what is compared, by case.
        labels: classes that are evaluated.
        tolerances_mm: of NSD.
        notes: sentences about what is not evaluated.
    """

    tasks: dict[str, CaseTask]
    labels: EvaluationLabels
    tolerances_mm: tuple[float, ...]
    notes: tuple[str, ...] = ()

    def scores(self, num_processes: int | None = None, *, hidden: bool = False) -> dict[str, CaseResult]:
        """The scores of every case; ``hidden`` shows no progress bar. Processes as in :func:`evaluate_folders`."""
        return map_cases(
            evaluate_case,
            {case: (task,) for case, task in self.tasks.items()},
            num_processes=default_processes() if num_processes is None else num_processes,
            description="Evaluation",
            hidden=hidden,
        )

    def evaluation(self, scores: Mapping[str, CaseResult]) -> Evaluation:
        """Tables and means of the scores of all cases, wherever they were computed."""
        ordered = {case: scores[case] for case in self.tasks}
        left_out = sorted(set().union(*(result.not_evaluated for result in ordered.values())))
        notes = [*self.notes, *_geometry_notes(ordered)]
        if left_out:
            notes.append(f"label values in the files that are not evaluated: {', '.join(map(str, left_out))}")
        return collect(self.tasks, ordered, self.labels, self.tolerances_mm, notes)


def evaluate_folders(
    reference_folder: Folder,
    prediction_folder: Folder,
    labels: EvaluationLabels | Iterable[int | Sequence[int]] | None = None,
    *,
    dataset_json: Mapping[str, Any] | Folder | None = None,
    ignore_label: int | None = None,
    file_ending: str | None = None,
    reader_writer: type | None = None,
    num_processes: int | None = None,
    nsd_tolerance_mm: float | Sequence[float] = 1.0,
    cases: Iterable[str] | None = None,
) -> Evaluation:
    """Compares every reference label with the prediction of the same name.

    Args:
        reference_folder, prediction_folder, labels, dataset_json, ignore_label, file_ending, reader_writer,
        nsd_tolerance_mm, cases: as for :func:`match_folders`.
        num_processes: by default nnU-Net's number (8, or ``$nnUNet_def_n_proc``), at most one per core and case.

    Returns:
        Table per case and class, means per class, and the mean over the foreground classes (mean over the classes of
        their means over the cases, as nnU-Net's ``foreground_mean``; metrics of excluded cases, in which a class is in
        neither map, are not part of it).

    Raises:
        UserError: as :func:`match_folders`, and for files that cannot be read or are no label maps, differing grids,
            label values that ``dataset_json`` does not declare, and a dead worker.
    """
    pair = match_folders(
        reference_folder,
        prediction_folder,
        labels,
        dataset_json=dataset_json,
        ignore_label=ignore_label,
        file_ending=file_ending,
        reader_writer=reader_writer,
        nsd_tolerance_mm=nsd_tolerance_mm,
        cases=cases,
    )
    return pair.evaluation(pair.scores(num_processes))


def match_folders(
    reference_folder: Folder,
    prediction_folder: Folder,
    labels: EvaluationLabels | Iterable[int | Sequence[int]] | None = None,
    *,
    dataset_json: Mapping[str, Any] | Folder | None = None,
    ignore_label: int | None = None,
    file_ending: str | None = None,
    reader_writer: type | None = None,
    nsd_tolerance_mm: float | Sequence[float] = 1.0,
    cases: Iterable[str] | None = None,
) -> FolderPair:
    """Finds what is to be compared, without reading the label maps.

    Args:
        reference_folder: label files ``<case><file_ending>``.
        prediction_folder: predictions of the same names.
        labels: classes to evaluate: label values, sequences of values for regions, or :class:`EvaluationLabels`.
            Without it, the classes (or regions) and the ignore label of ``dataset_json``.
        dataset_json: content or path of ``dataset.json``. Without it and without ``labels``, the one found by
            :func:`nnssl.evaluation.labels.find_dataset_json`.
        ignore_label: voxels where the reference has this value are left out; only together with label values.
        file_ending: by default that of ``dataset_json``, or that of the files in ``reference_folder``.
        reader_writer: class of nnU-Net that reads the files; by default chosen as nnU-Net does.
        nsd_tolerance_mm: one or several tolerances of NSD in mm.
        cases: names of the cases to evaluate; by default all of ``reference_folder``.

    Raises:
        UserError: for missing predictions and links that lead nowhere (all are named), and unusable arguments.
    """
    reference_folder, prediction_folder = _check_folders(reference_folder, prediction_folder)
    tolerances = _tolerances(nsd_tolerance_mm)
    if dataset_json is None and labels is None:
        dataset_json = find_dataset_json(reference_folder, prediction_folder)
    where: object = "dataset.json"
    if isinstance(dataset_json, (str, os.PathLike)):
        where, dataset_json = dataset_json, read_dataset_json(dataset_json)
    chosen_labels = _labels(labels, dataset_json, ignore_label, where)
    ending = file_ending or (dataset_json or {}).get("file_ending") or _common_ending(reference_folder)
    names, notes = _choose_cases(reference_folder, prediction_folder, ending, cases)
    if reader_writer is None:
        reader_writer = _find_reader(dataset_json, ending, reference_folder / (names[0] + ending))
    tasks = {
        case: CaseTask(
            case,
            reference_folder / (case + ending),
            prediction_folder / (case + ending),
            reader_writer,
            chosen_labels,
            tolerances,
        )
        for case in names
    }
    return FolderPair(tasks, chosen_labels, tolerances, tuple(notes))


def _geometry_notes(results: Mapping[str, CaseResult]) -> list[str]:
    """Sentences about cases whose distances are not in mm, or are wrong."""
    notes = []
    for unit in sorted({result.unit for result in results.values()} - {"mm"}):
        own = [case for case, result in results.items() if result.unit == unit]
        which = "all cases" if len(own) == len(results) else name_some(own)
        notes.append(f"no spacing is known, distances, volumes and tolerances of NSD are in {unit}: {which}")
    if sheared := [case for case, result in results.items() if not result.orthonormal]:
        notes.append(f"voxel axes are not orthonormal (sheared), so that distances are wrong: {name_some(sheared)}")
    return notes


def _check_folders(reference_folder: Folder, prediction_folder: Folder) -> tuple[Path, Path]:
    reference, prediction = Path(reference_folder), Path(prediction_folder)
    for folder, what in ((reference, "reference labels"), (prediction, "predictions")):
        if not folder.is_dir():
            raise UserError(f"folder of the {what} not found", where=folder)
    if reference.samefile(prediction):
        raise UserError("reference and prediction are the same folder", where=reference)
    return reference, prediction


def _tolerances(nsd_tolerance_mm: float | Sequence[float]) -> tuple[float, ...]:
    tolerances = tuple(dict.fromkeys(np.atleast_1d(nsd_tolerance_mm).astype(float).tolist()))
    if not tolerances or not all(0 <= value < float("inf") for value in tolerances):
        raise UserError("NSD tolerance is not a distance", expected="one or more values in mm", found=nsd_tolerance_mm)
    return tolerances


def _labels(
    labels: EvaluationLabels | Iterable[int | Sequence[int]] | None,
    dataset_json: Mapping[str, Any] | None,
    ignore_label: int | None,
    where: object,
) -> EvaluationLabels:
    if ignore_label is not None and (labels is None or isinstance(labels, EvaluationLabels)):
        raise UserError(
            "an ignore label is given without label values", fix="declare it in dataset.json, or name the values (-l)"
        )
    if isinstance(labels, EvaluationLabels):
        return labels
    if labels is not None:
        return EvaluationLabels.from_values(labels, ignore_label)
    assert dataset_json is not None
    return EvaluationLabels.from_dataset_json(dataset_json, where)


def _common_ending(folder: Path) -> str:
    from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

    known = {ending for reader in LIST_OF_IO_CLASSES for ending in reader.supported_file_endings}
    # of .nii.gz and .gz the longer one counts, written as in the names
    endings = {
        name[-max(matches) :]
        for name in _file_names(folder)
        if (matches := [len(ending) for ending in known if name.lower().endswith(ending)])
    }
    if len(endings) != 1:
        raise UserError(
            "the format of the label files is not clear",
            where=folder,
            expected="files of one of " + " ".join(sorted(known)),
            found=" ".join(sorted(endings)) or "no such file",
            fix="keep files of one format in the folder, or name a dataset.json with file_ending (-djfile)",
        )
    return endings.pop()


def _list_cases(folder: Path, ending: str) -> list[str]:
    return sorted(name[: -len(ending)] for name in _file_names(folder) if name.endswith(ending))


def _file_names(folder: Path) -> list[str]:
    """Names of the files that are not hidden, and of links that lead nowhere."""
    return [
        entry.name
        for entry in os.scandir(folder)
        if not entry.name.startswith(".") and (entry.is_file() or not os.path.exists(entry.path))
    ]


def _choose_cases(
    reference_folder: Path, prediction_folder: Path, ending: str, cases: Iterable[str] | None
) -> tuple[list[str], list[str]]:
    """Cases to evaluate, and notes about predictions that are not evaluated."""
    references, predictions = _list_cases(reference_folder, ending), _list_cases(prediction_folder, ending)
    if not references:
        raise UserError(
            "no reference labels",
            where=reference_folder,
            expected=f"files *{ending}",
            fix="check the folder and the file_ending of dataset.json",
        )
    chosen = references if cases is None else list(dict.fromkeys(cases))
    if not chosen:
        raise UserError("the list of cases is empty")
    for present, folder, what in (
        (references, reference_folder, "reference labels"),
        (predictions, prediction_folder, "predictions"),
    ):
        missing = [case for case in chosen if case not in set(present)]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(chosen)} {what} are missing",
                where=folder,
                expected=f"files named as the case, with the ending {ending}",
                found=f"none for {', '.join(missing)}",
                fix="predict these cases, or name the cases to evaluate (--cases)" if what == "predictions" else None,
            )
    _check_links([folder / (case + ending) for folder in (reference_folder, prediction_folder) for case in chosen])
    extra = [case for case in predictions if case not in set(references)]
    if extra and cases is None:
        return chosen, [f"predictions without reference label, not evaluated: {', '.join(extra)}"]
    return chosen, []


def _check_links(files: Sequence[Path]) -> None:
    broken = [file for file in files if not file.exists()]
    if broken:
        raise UserError(
            f"{len(broken)} label files are links to files that do not exist",
            where=name_some(map(str, broken)),
            found=f"a link to {os.readlink(broken[0])}",
            fix="mount or restore the files that the links lead to, or replace the links by them",
        )


def _find_reader(dataset_json: Mapping[str, Any] | None, ending: str, example: Path) -> type:
    from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

    description = {**(dataset_json or {}), "file_ending": ending}
    # nnU-Net prints the traceback of every reader that does not open the example
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        for file in (str(example), None):
            with contextlib.suppress(RuntimeError):
                return determine_reader_writer_from_dataset_json(description, file, verbose=False)
    raise UserError("no reader of nnU-Net opens the label files", where=example, found=ending)
