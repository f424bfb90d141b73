"""From a raw data set to all that training needs: check, fingerprint, folds, plans, preprocessed cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.dataset.integrity import check_dataset
from nnssl.dataset.raw import RawDataset
from nnssl.dataset.splits import ensure_splits
from nnssl.errors import UserError
from nnssl.planners.mirroring import MirrorChoice
from nnssl.planners.planning import PLANNERS, check_arguments, find_planner, make_plans
from nnssl.planners.semi_supervised import PLANNED_CONFIGURATIONS
from nnssl.preprocessing.alignment import align_cases
from nnssl.preprocessing.configuration import (
    MANIFESTS_FOLDER,
    Outcome,
    copy_reference_labels,
    preprocess_configuration,
    refuse_unusable_cases,
)
from nnssl.preprocessing.content import content_keys
from nnssl.preprocessing.fingerprint import make_fingerprint
from nnssl.preprocessing.registration import AlignmentKind
from nnssl.utils.lock import only_process
from nnssl.utils.paths import dataset_name, preprocessed_folder

DEFAULT_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")


@dataclass(frozen=True)
class Preparation:
    """What `prepare_dataset` did.

    Attributes:
        dataset: full name.
        num_labeled, num_unlabeled: numbers of cases.
        plans: content of the plans file.
        planned: the planned ones of the configurations asked for.
        outcomes: per configuration what was preprocessed; empty if preprocessing was left out.
        notes: warnings of the integrity check and what is to be told about folds, a sentence each.
    """

    dataset: str
    num_labeled: int
    num_unlabeled: int
    plans: dict[str, Any]
    planned: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    notes: tuple[str, ...]


def prepare_dataset(
    name_or_id: str | int,
    *,
    planner: str = "nnSSLPlanner",
    configurations: Sequence[str] = DEFAULT_CONFIGURATIONS,
    num_processes: Mapping[str, int] | int = 1,
    num_processes_fingerprint: int = 1,
    check_integrity: bool = True,
    allow_suspicious: bool = False,
    preprocess: bool = True,
    clean: bool = False,
    gpu_memory_target_in_gb: float | None = None,
    preprocessor_name: str = "DefaultPreprocessor",
    overwrite_target_spacing: list[float] | None = None,
    overwrite_plans_name: str | None = None,
    mirror_axes: MirrorChoice = "auto",
    align_atlases: AlignmentKind | Literal["none"] | None = None,
    verbose: bool = False,
    tell: Callable[[str], None] = lambda sentence: None,
) -> Preparation:
    """Checks, fingerprints, splits, plans and preprocesses a data set; does again only what is new or changed.

    Args:
        name_or_id: name or id of a data set in ``$nnUNet_raw``.
        planner: class name of a planner of nnssl or nnU-Net.
        configurations: configurations to preprocess; of nnU-Net's own names those not planned are left out.
        num_processes: worker processes for preprocessing, one number or one per configuration.
        num_processes_fingerprint: worker processes for integrity check and fingerprint.
        check_integrity: whether every file is read and checked first.
        allow_suspicious: whether findings that are mistakes most of the time are told as warnings.
        preprocess: False ends after planning.
        clean: fingerprint and preprocess every case again.
        gpu_memory_target_in_gb, preprocessor_name, overwrite_target_spacing, overwrite_plans_name, mirror_axes: see
            `make_plans`.
        align_atlases: alignment of the labeled cases to a common space; None keeps one that is there up to date, and
            ``none`` removes it.
        verbose: show what nnU-Net prints.
        tell: is given a short sentence before each step.

    Raises:
        UserError: the data set has errors, or an argument is wrong.
    """
    planner_class = find_planner(planner)
    check_arguments(preprocessor_name, gpu_memory_target_in_gb, overwrite_target_spacing)
    if planner in PLANNERS:
        _refuse_unknown(configurations, ())
    raw = RawDataset.open(dataset_name(name_or_id))
    refuse_unusable_cases(raw)
    folder = preprocessed_folder() / raw.name
    with only_process(folder, "plans or preprocesses this data set"):
        notes: list[str] = []
        if check_integrity:
            tell(f"Integrity check of {raw.name}")
            notes += check_dataset(raw, num_processes_fingerprint, allow_suspicious)
        tell(f"Fingerprint of {len(raw.labeled)} labeled and {len(raw.unlabeled)} unlabeled cases")
        cache = folder / MANIFESTS_FOLDER / "content.json"
        keys = content_keys(raw, cache, num_threads=num_processes_fingerprint, clean=clean)
        make_fingerprint(raw, keys, num_processes=num_processes_fingerprint, clean=clean)
        if align_atlases not in (None, "none"):
            tell(f"Alignment of {len(raw.labeled)} labeled cases ({align_atlases})")
        align_cases(raw, keys, align_atlases, num_processes=num_processes_fingerprint, clean=clean)
        notes += ensure_splits(raw, folder)
        tell(f"Planning with {planner}")
        plans = make_plans(
            planner_class,
            raw.name,
            gpu_memory_target_in_gb=gpu_memory_target_in_gb,
            preprocessor_name=preprocessor_name,
            overwrite_target_spacing=overwrite_target_spacing,
            overwrite_plans_name=overwrite_plans_name,
            mirror_axes=mirror_axes,
            verbose=verbose,
        )
        planned = _planned(configurations, plans)
        outcomes = []
        for configuration in planned if preprocess else ():
            tell(f"Preprocessing for {configuration}")
            workers = num_processes if isinstance(num_processes, int) else num_processes[configuration]
            outcomes.append(
                preprocess_configuration(
                    raw, plans, configuration, keys, num_processes=workers, clean=clean, verbose=verbose
                )
            )
        if preprocess:
            copy_reference_labels(raw)
        return Preparation(
            raw.name, len(raw.labeled), len(raw.unlabeled), plans, planned, tuple(outcomes), tuple(notes)
        )


def _planned(configurations: Sequence[str], plans: dict[str, Any]) -> tuple[str, ...]:
    available = PlansManager(plans).available_configurations
    _refuse_unknown(configurations, available)
    return tuple(dict.fromkeys(name for name in configurations if name in available))


def _refuse_unknown(configurations: Sequence[str], available: Sequence[str]) -> None:
    for configuration in configurations:
        if configuration not in available and configuration not in PLANNED_CONFIGURATIONS:
            raise UserError(
                f"there is no configuration {configuration}",
                expected=", ".join(dict.fromkeys((*PLANNED_CONFIGURATIONS, *available))),
            )
