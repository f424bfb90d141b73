"""nnU-Net's planners applied to labeled and unlabeled cases together."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
)
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnssl.planners.correspondence import decide as decide_correspondence
from nnssl.planners.memory import step_memory_factor
from nnssl.planners.mirroring import MirrorChoice, decide
from nnssl.preprocessing.alignment import alignment_summary
from nnssl.preprocessing.fingerprint import case_counts, class_evidence, class_places
from nnssl.utils.files import read_json, write_json
from nnssl.utils.paths import preprocessed_folder

_WORKERS = "nnUNet_n_proc_DA"
PLANNED_CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres")


class SemiSupervisedPlanning:
    """Mixin, to be named before one of nnU-Net's planners.

    Spacing, patch size and topology follow nnU-Net's rules; the fingerprint holds all cases, and every rule that
    counts the voxels of the data set counts labeled and unlabeled cases. The memory target means the whole
    semi-supervised step (`step_memory_factor`); nnU-Net's rules get what is left for the labeled batch. Default
    targets are 2.25 times nnU-Net's, so that patch and labeled batch equal those of stock nnU-Net on the same cases.

    The plans stay valid for stock nnU-Net, which ignores the additional blocks ``semi_supervised``.

    Args:
        dataset_name_or_id: name or id of the data set; its fingerprint must have been made by nnssl.
        gpu_memory_target_in_gb: memory of one semi-supervised step; None for the default of the class.
        preprocessor_name: nnU-Net preprocessor.
        plans_name: None for the default of the class.
        overwrite_target_spacing: spacing of 3d_fullres, three numbers in the axis order of the images.
        suppress_transpose: whether the axes keep their order.
        mirror_axes: axes that training and prediction mirror: ``auto`` by the labeled cases, ``all``, ``none``, or
            axes of the 3D patch (of the 2D patch for 2D images); see `nnssl.planners.mirroring`.
    """

    default_memory_target_in_gb: float
    default_plans_name: str
    unlabeled_per_labeled = 1
    fixed_labeled_batch_size: int | None = None

    dataset_fingerprint: dict[str, Any]
    dataset_name: str
    plans_identifier: str

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float | None = None,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str | None = None,
        overwrite_target_spacing: list[float] | tuple[float, ...] | None = None,
        suppress_transpose: bool = False,
        mirror_axes: MirrorChoice = "auto",
    ):
        self.step_memory_target_gb = float(gpu_memory_target_in_gb or self.default_memory_target_in_gb)
        self.memory_factor = step_memory_factor(self.unlabeled_per_labeled)
        with warnings.catch_warnings():
            # nnU-Net's ResEnc planners warn of a changed target in their own unit, which would only confuse here
            warnings.filterwarnings("ignore", message=".*non-standard gpu_memory_target_in_gb")
            super().__init__(  # type: ignore[call-arg]
                dataset_name_or_id,
                self.step_memory_target_gb / self.memory_factor,
                preprocessor_name,
                plans_name or self.default_plans_name,
                overwrite_target_spacing,
                suppress_transpose,
            )
        self.mirror_choice = mirror_axes
        self.num_labeled, self.num_unlabeled = case_counts(self.dataset_fingerprint)
        # nnU-Net reads the number of training cases from here wherever it needs the voxels of the whole data set
        self.dataset_json: dict[str, Any] = {**self.dataset_json, "numTraining": self.num_labeled + self.num_unlabeled}

    def generate_data_identifier(self, configuration_name: str) -> str:
        """``<plans>_<configuration>``: no two plans files share preprocessed data.

        nnU-Net's ResEnc planners share the data of the plain planner. Here plans are made again whenever cases are
        added or labeled, and may then differ in spacing or normalization from older plans of another planner.
        """
        return f"{self.plans_identifier}_{configuration_name}"

    def static_estimate_VRAM_usage(self, *args: Any, **kwargs: Any) -> int:
        """nnU-Net's, which gives torch ``nnUNet_n_proc_DA`` threads; that is 0 for training without workers."""
        workers = os.environ.get(_WORKERS)
        if workers == "0":
            os.environ[_WORKERS] = "1"
        try:
            return super().static_estimate_VRAM_usage(*args, **kwargs)  # type: ignore[misc]
        finally:
            if workers is not None:
                os.environ[_WORKERS] = workers

    def get_plans_for_configuration(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """nnU-Net's plan of one configuration with the batch composition added."""
        plan = super().get_plans_for_configuration(*args, **kwargs)  # type: ignore[misc]
        plan["batch_size"] = self.fixed_labeled_batch_size or int(plan["batch_size"])
        plan["semi_supervised"] = {
            "labeled_batch_size": plan["batch_size"],
            "unlabeled_batch_size": round(plan["batch_size"] * self.unlabeled_per_labeled),
        }
        return plan

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Writes the plans atomically and keeps configurations that a user added to an older file.

        Configurations of nnU-Net's own names are not kept: a 3d_lowres planned for fewer cases may not be wanted any
        more, and training on it would use an outdated plan without a word.
        """
        plans["semi_supervised"] = {
            "gpu_memory_target_in_gb": self.step_memory_target_gb,
            "memory_factor": self.memory_factor,
            "num_labeled": self.num_labeled,
            "num_unlabeled": self.num_unlabeled,
        }
        self._add_mirror_axes(plans)
        self._add_correspondence(plans)
        recursive_fix_for_json_export(plans)
        file = preprocessed_folder() / self.dataset_name / f"{self.plans_identifier}.json"
        plans["configurations"].update(_added_configurations(file))
        write_json(plans, file)

    def _add_mirror_axes(self, plans: dict[str, Any]) -> None:
        planned = [plan for plan in plans["configurations"].values() if "patch_size" in plan]
        decision = decide(
            self.mirror_choice,
            class_evidence(self.dataset_fingerprint),
            plans["transpose_forward"],
            self.dataset_json["labels"],
            patch_dimensions=max(len(plan["patch_size"]) for plan in planned),
        )
        for plan in planned:
            plan["semi_supervised"].update(decision.entries(len(plan["patch_size"])))

    def _add_correspondence(self, plans: dict[str, Any]) -> None:
        summary = alignment_summary(preprocessed_folder() / self.dataset_name)
        decision = decide_correspondence(class_places(self.dataset_fingerprint), summary)
        for plan in plans["configurations"].values():
            if "patch_size" in plan:
                plan["semi_supervised"].update(decision.entries())


def _added_configurations(plans_file: Path) -> dict[str, Any]:
    if not plans_file.is_file():
        return {}
    plans = read_json(plans_file, fix="delete the file and run nnssl_plan_and_preprocess again")
    return {name: value for name, value in plans["configurations"].items() if name not in PLANNED_CONFIGURATIONS}


class nnSSLPlanner(SemiSupervisedPlanning, ExperimentPlanner):
    """nnU-Net's default planner (plain convolutional U-Net) for semi-supervised training; 18 GB."""

    default_memory_target_in_gb = 18.0
    default_plans_name = "nnSSLPlans"


class nnSSLPlannerResEncM(SemiSupervisedPlanning, nnUNetPlannerResEncM):
    """nnU-Net's residual encoder preset M for semi-supervised training; 18 GB."""

    default_memory_target_in_gb = 18.0
    default_plans_name = "nnSSLResEncUNetMPlans"


class nnSSLPlannerResEncL(SemiSupervisedPlanning, nnUNetPlannerResEncL):
    """nnU-Net's residual encoder preset L for semi-supervised training; 54 GB."""

    default_memory_target_in_gb = 54.0
    default_plans_name = "nnSSLResEncUNetLPlans"


class nnSSLPlannerCPU(SemiSupervisedPlanning, ExperimentPlanner):
    """Preset for machines without GPU: a quarter of nnU-Net's features, 2 labeled + 2 unlabeled patches; 1 GB.

    The reference values of nnU-Net's memory rule are those of a patch of 64x64x64 (256x256 in 2D), with a margin
    that lets anisotropic patches of as many voxels pass, and that ends below 300,000 voxels. Measured for a step in
    fp32 with teacher: 0.75 GB for 64x64x64, 0.92 GB for 16x128x128, 0.34 GB for 256x256; the target of 1 GB stands
    for the 3D reference. In 2D it is time that limits the patch, not memory. On 2 cores with avx512_bf16 a supervised
    step on 64x64x64 voxels takes 0.65 s in fp32 and 0.24 s in bf16 (channels last), hence a semi-supervised one about
    1.5 and 0.5 s.
    """

    default_memory_target_in_gb = 1.0
    default_plans_name = "nnSSLCPUPlans"
    # on a CPU the step takes longer in proportion to the batch
    fixed_labeled_batch_size = 2

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.UNet_base_num_features = 8
        self.UNet_max_features_2d = 128
        self.UNet_max_features_3d = 80
        self.UNet_reference_val_3d = 16_500_000
        self.UNet_reference_val_2d = 5_800_000
        self.UNet_reference_val_corresp_GB = self.default_memory_target_in_gb / self.memory_factor
        self.UNet_reference_val_corresp_bs_3d = self.fixed_labeled_batch_size
        self.UNet_reference_val_corresp_bs_2d = self.fixed_labeled_batch_size
