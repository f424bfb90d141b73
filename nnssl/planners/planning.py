"""From a fingerprint to a plans file."""

from __future__ import annotations

import contextlib
import difflib
import io
from pathlib import Path
from typing import Any

import nnunetv2
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnssl.errors import UserError
from nnssl.planners.mirroring import MirrorChoice
from nnssl.planners.semi_supervised import (
    SemiSupervisedPlanning,
    nnSSLPlanner,
    nnSSLPlannerCPU,
    nnSSLPlannerResEncL,
    nnSSLPlannerResEncM,
)
from nnssl.utils.files import read_json
from nnssl.utils.paths import preprocessed_folder

PLANNERS: dict[str, type[ExperimentPlanner]] = {
    planner.__name__: planner for planner in (nnSSLPlanner, nnSSLPlannerResEncM, nnSSLPlannerResEncL, nnSSLPlannerCPU)
}


def find_planner(name: str) -> type[ExperimentPlanner]:
    """Planner class of nnssl or, for other names, of nnU-Net; ``UserError`` with a suggestion if there is none."""
    if name in PLANNERS:
        return PLANNERS[name]
    found = _find_nnunet_class("experiment_planning", name)
    if isinstance(found, type) and issubclass(found, ExperimentPlanner):
        return found
    close = difflib.get_close_matches(name, PLANNERS, n=1, cutoff=0.5)
    raise UserError(
        f"there is no planner {name}",
        expected=f"{', '.join(PLANNERS)}, or a planner class of nnU-Net",
        fix=f"did you mean {close[0]}?" if close else None,
    )


def make_plans(
    planner: type[ExperimentPlanner],
    dataset_name: str,
    *,
    gpu_memory_target_in_gb: float | None = None,
    preprocessor_name: str = "DefaultPreprocessor",
    overwrite_target_spacing: list[float] | None = None,
    overwrite_plans_name: str | None = None,
    mirror_axes: MirrorChoice = "auto",
    verbose: bool = False,
) -> dict[str, Any]:
    """Plans a data set whose fingerprint exists; returns the content of the plans file that was written.

    Args:
        planner: planner class of nnssl or nnU-Net.
        dataset_name: full name of the data set.
        gpu_memory_target_in_gb: None for the planner's own. With nnssl's planners it means the whole semi-supervised
            step, with nnU-Net's the supervised one.
        preprocessor_name: a preprocessor class of nnU-Net.
        overwrite_target_spacing: spacing of 3d_fullres in mm, three numbers in the axis order of the images.
        overwrite_plans_name: name of the plans file, None for the planner's own.
        mirror_axes: axes that training and prediction mirror, ``auto`` by the labeled cases; nnssl's planners only.
        verbose: show what nnU-Net prints while planning.

    Raises:
        UserError: an argument is out of range or names no preprocessor.
    """
    check_arguments(preprocessor_name, gpu_memory_target_in_gb, overwrite_target_spacing)
    options: dict[str, Any] = {}
    if overwrite_plans_name is not None:
        options["plans_name"] = overwrite_plans_name
    if gpu_memory_target_in_gb is not None:
        options["gpu_memory_target_in_gb"] = gpu_memory_target_in_gb
    if mirror_axes != "auto":
        if not issubclass(planner, SemiSupervisedPlanning):
            raise UserError(
                f"plans of {planner.__name__} hold no axes to mirror", fix=f"plan with one of {', '.join(PLANNERS)}"
            )
        options["mirror_axes"] = mirror_axes
    with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()):
        instance = planner(
            dataset_name,
            preprocessor_name=preprocessor_name,
            overwrite_target_spacing=overwrite_target_spacing,
            **options,
        )
        instance.plan_experiment()
    folder = preprocessed_folder() / dataset_name
    # nnU-Net copies the file with its permissions; the copy of a read-only one could not be renewed by the next run
    (folder / "dataset.json").chmod(0o644)
    return read_json(folder / f"{instance.plans_identifier}.json")


def check_arguments(preprocessor_name: str, memory_target: float | None, spacing: list[float] | None) -> None:
    """``UserError`` for arguments that `make_plans` cannot work with."""
    preprocessor = _find_nnunet_class("preprocessing", preprocessor_name)
    if not (isinstance(preprocessor, type) and issubclass(preprocessor, DefaultPreprocessor)):
        raise UserError(
            f"nnU-Net has no preprocessor {preprocessor_name}",
            expected="DefaultPreprocessor, or a subclass of it in nnunetv2.preprocessing",
        )
    if memory_target is not None and memory_target <= 0:
        raise UserError("the memory target must be positive", found=f"{memory_target} GB")
    if spacing is not None and (len(spacing) != 3 or min(spacing) <= 0):
        raise UserError("the target spacing must be three positive numbers", found=spacing)


def _find_nnunet_class(subpackage: str, name: str) -> Any:
    folder = Path(nnunetv2.__path__[0]) / subpackage
    return recursive_find_python_class(str(folder), name, current_module=f"nnunetv2.{subpackage}")
