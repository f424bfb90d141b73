"""Preprocessing of all cases of one configuration, as far as it is not done yet."""

from __future__ import annotations

import glob
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.dataloading.cases import MASK_SUFFIX, unlabeled_folder
from nnssl.dataset.parallel import map_cases
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.preprocessing.case import CasePreprocessor, Kind
from nnssl.preprocessing.content import ContentKeys, settings_key
from nnssl.preprocessing.manifest import MANIFEST_FILE, Manifest, stored_settings, was_interrupted
from nnssl.utils.files import atomic_path
from nnssl.utils.paths import preprocessed_folder

MANIFESTS_FOLDER = "manifests"
REFERENCE_FOLDER = "gt_segmentations"


@dataclass(frozen=True)
class Outcome:
    """What a run did for one configuration: numbers of cases made, found finished, and removed."""

    configuration: str
    made: int
    unchanged: int
    removed: int


def preprocess_configuration(
    raw: RawDataset,
    plans: dict[str, Any],
    configuration: str,
    keys: ContentKeys,
    *,
    num_processes: int,
    clean: bool = False,
    verbose: bool = False,
) -> Outcome:
    """Preprocesses the labeled and unlabeled cases that are new, or changed, or whose rules in the plans changed.

    Labeled cases go to ``<data_identifier>/`` in nnU-Net's format, unlabeled ones to ``<data_identifier>_unlabeled/``:
    ``<case>.b2nd`` (image), ``<case>_mask.b2nd`` (nonzero mask), ``<case>.pkl`` (properties). Cases that are no longer
    in the data set are removed from both.

    The manifest of the unlabeled cases lies in their folder. That of the labeled ones lies in ``manifests/`` beside,
    since nnU-Net infers the storage format from the file endings in the folder.

    Args:
        raw: the data set.
        plans: content of the plans file.
        configuration: a configuration of the plans.
        keys: content keys of the cases.
        num_processes: worker processes.
        clean: make every case again.
        verbose: whether nnU-Net's preprocessor prints.

    Raises:
        UserError: a case has a name that its products cannot have, or a worker died.
        RuntimeError: a case cannot be preprocessed; the message names it and holds the traceback.
    """
    refuse_unusable_cases(raw)
    dataset_folder = preprocessed_folder() / raw.name
    manifests = open_manifests(plans, configuration, raw.dataset_json, dataset_folder)
    cases: dict[Kind, dict[str, tuple[list[str], str | None]]] = {
        "labeled": {case: (files.images, files.label) for case, files in raw.labeled.items()},
        "unlabeled": {case: (images, None) for case, images in raw.unlabeled.items()},
    }
    jobs: dict[str, tuple[Any, ...]] = {}
    removed: set[str] = set()
    for kind, manifest in manifests.items():
        finished = set() if clean else {case for case in cases[kind] if manifest.holds(case, keys.of(case))}
        removed.update(manifest.keep_only(finished, complete=len(finished) == len(cases[kind])))
        for case in sorted(set(cases[kind]) - finished):
            jobs[case] = (case, *cases[kind][case], keys.of(case))

    prefix = f".tmp_{manifests['labeled'].folder.name}_"
    for abandoned in dataset_folder.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=dataset_folder))
    preprocess = CasePreprocessor(plans, configuration, raw.dataset_json, manifests, scratch, verbose)
    try:
        map_cases(preprocess, jobs, num_processes=num_processes, description=f"Preprocessing {configuration}")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for kind, manifest in open_manifests(plans, configuration, raw.dataset_json, dataset_folder).items():
        manifest.keep_only(set(cases[kind]))
    present = set(raw.labeled) | set(raw.unlabeled)
    return Outcome(configuration, made=len(jobs), unchanged=len(present) - len(jobs), removed=len(removed - present))


def open_manifests(
    plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], dataset_folder: Path
) -> dict[Kind, Manifest]:
    """Manifests of the labeled and unlabeled cases of a configuration."""
    plans_manager = PlansManager(plans)
    manager = plans_manager.get_configuration(configuration)
    identifier = manager.data_identifier
    labels = {name: dataset_json.get(name) for name in ("labels", "regions_class_order")}
    unlabeled = unlabeled_folder(dataset_folder / identifier)
    return {
        "labeled": Manifest.open(
            dataset_folder / MANIFESTS_FOLDER / f"{identifier}.json",
            dataset_folder / identifier,
            settings_key(plans_manager, manager, labels),
        ),
        "unlabeled": Manifest.open(unlabeled / MANIFEST_FILE, unlabeled, settings_key(plans_manager, manager, None)),
    }


def require_preprocessed(plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any]) -> None:
    """``UserError`` unless the cases of a configuration were preprocessed by nnssl with just these plans, all of them.

    A folder without manifest was made by stock nnU-Net and is taken as it is.
    """
    dataset_folder = preprocessed_folder() / plans["dataset_name"]
    fix = (
        f"run nnssl_plan_and_preprocess for {plans['dataset_name']} with the planner {plans['experiment_planner_used']}"
    )
    for kind, manifest in open_manifests(plans, configuration, dataset_json, dataset_folder).items():
        stored = stored_settings(manifest.file)
        if kind == "labeled" and not manifest.folder.is_dir():
            raise UserError(f"configuration {configuration} is not preprocessed", where=manifest.folder, fix=fix)
        if stored is not None and stored != manifest.settings:
            raise UserError(
                f"the preprocessed {kind} cases were made by other plans",
                where=manifest.folder,
                expected=f"the spacing, normalization and resampling of {plans['plans_name']}, {configuration}",
                fix=fix,
            )
        if was_interrupted(manifest.file):
            raise UserError(
                f"the preprocessing of {configuration} was interrupted, or is still at work",
                where=manifest.folder,
                found=f"{len(manifest.cases)} finished {kind} cases",
                fix=f"{fix}: it makes only what is missing",
            )
        damaged = manifest.damaged()
        if damaged:
            raise UserError(
                f"{len(damaged)} preprocessed {kind} case(s) are missing or cut off",
                where=manifest.folder,
                found=", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else ""),
                fix=f"{fix}: it makes only what is missing",
            )


def refuse_unusable_cases(raw: RawDataset) -> None:
    """``UserError`` if there is no labeled case, or if names of cases would collide in the preprocessed folders.

    A case called ``<x>_seg`` would be dropped from training without a word, taken for the segmentation of ``<x>``.
    """
    if not raw.labeled:
        raise UserError("no labeled case", where=raw.folder, expected="images in imagesTr and their labels in labelsTr")
    reserved = (
        ("imagesTr", raw.labeled, "_seg"),
        ("imagesUn", raw.unlabeled, "_seg"),
        ("imagesUn", raw.unlabeled, MASK_SUFFIX),
    )
    for folder, cases, suffix in reserved:
        for case in cases:
            if case.endswith(suffix):
                raise UserError(
                    f"a case must not be called {case}",
                    where=raw.folder / folder,
                    found=f"names ending in {suffix} are those of preprocessed masks",
                    fix="rename the case",
                )
    both = sorted(set(raw.labeled) & set(raw.unlabeled))
    if both:
        raise UserError(f"case {both[0]} is labeled and unlabeled", where=raw.folder, fix="delete it from imagesUn")


def copy_reference_labels(raw: RawDataset) -> None:
    """Copies the labels to ``gt_segmentations``, where nnU-Net's validation looks for them; removes those of others."""
    folder = preprocessed_folder() / raw.name / REFERENCE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    names = {f"{case}{raw.file_ending}": files.label for case, files in raw.labeled.items()}
    for stale in [file for file in folder.iterdir() if file.name not in names]:
        stale.unlink()
    for name, label in names.items():
        target, source = folder / name, Path(label).stat()
        if target.is_file():
            present = target.stat()
            if (present.st_size, present.st_mtime_ns) == (source.st_size, source.st_mtime_ns):
                continue
        with atomic_path(target) as temporary:
            shutil.copy2(label, temporary)
