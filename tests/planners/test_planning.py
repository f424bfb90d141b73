"""Plans from hand-written fingerprints, so that data sets of any size can be planned without their images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl.errors import UserError
from nnssl.planners.planning import PLANNERS, find_planner, make_plans
from nnssl.planners.semi_supervised import nnSSLPlanner, nnSSLPlannerCPU, nnSSLPlannerResEncL, nnSSLPlannerResEncM
from nnssl.utils.paths import preprocessed_folder
from tests.preprocessing.raw_data import NAME, write_dataset

HIPPOCAMPUS = (35, 50, 36)


@pytest.fixture
def dataset(raw_root) -> Path:
    """A raw data set of one labeled case; nnU-Net's planners look at its images only to find a reader."""
    return write_dataset(raw_root, labeled=1, unlabeled=0, shape=(16, 16, 16))


def write_fingerprint(
    shape: tuple[int, ...],
    *,
    labeled: int,
    unlabeled: int,
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
    unlabeled_spacing: tuple[float, ...] | None = None,
    pairs: Sequence[dict[str, Any]] = (),
) -> None:
    properties = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"), 1.0)
    fingerprint = {
        "spacings": [spacing] * labeled + [unlabeled_spacing or spacing] * unlabeled,
        "shapes_after_crop": [shape] * (labeled + unlabeled),
        "foreground_intensity_properties_per_channel": {"0": properties},
        "median_relative_size_after_cropping": 1.0,
        "class_pairs": {"labels": [1, 2], "votes_of": "labeled cases", "pairs": list(pairs)},
        "class_places": {
            "boxes": {},
            "pairs": 1,
            "overlap": {"relative": {"dice": 0.5, "chance": 0.1}, "bbox": {"dice": 0.6, "chance": 0.1}},
            "reference": "case_0",
        },
        "provenance": {"num_labeled": labeled, "num_unlabeled": unlabeled},
    }
    folder = preprocessed_folder() / NAME
    folder.mkdir(exist_ok=True)
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))


def set_num_training(dataset: Path, number: int) -> None:
    file = dataset / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"numTraining": number}))


def batch_sizes(configuration: dict[str, Any]) -> tuple[int, int]:
    """Numbers of labeled and unlabeled patches."""
    planned = configuration["semi_supervised"]
    return planned["labeled_batch_size"], planned["unlabeled_batch_size"]


def shared_entries(configuration: dict[str, Any]) -> dict[str, Any]:
    """All that stock nnU-Net plans, without the name of the folder."""
    return {key: value for key, value in configuration.items() if key not in ("semi_supervised", "data_identifier")}


@pytest.mark.parametrize(
    ("ours", "stock"),
    [
        (nnSSLPlanner, ExperimentPlanner),
        (nnSSLPlannerResEncM, nnUNetPlannerResEncM),
        (nnSSLPlannerResEncL, nnUNetPlannerResEncL),
    ],
    ids=lambda planner: planner.__name__,
)
def test_equals_stock_where_all_cases_are_labeled(dataset, ours, stock, recwarn):
    write_fingerprint((40, 96, 100), spacing=(2.5, 1.0, 1.0), labeled=50, unlabeled=0)
    set_num_training(dataset, 50)
    mine, theirs = make_plans(ours, NAME), make_plans(stock, NAME)
    assert mine["configurations"].keys() == theirs["configurations"].keys()
    for name, configuration in theirs["configurations"].items():
        assert shared_entries(mine["configurations"][name]) == shared_entries(configuration)
    assert mine["configurations"]["3d_fullres"]["data_identifier"] == f"{ours.default_plans_name}_3d_fullres"
    assert not [warning for warning in recwarn if "gpu_memory_target" in str(warning.message)]


def test_unlabeled_cases_count_like_labeled_ones(dataset):
    def plans_of(labeled: int, unlabeled: int) -> dict:
        write_fingerprint(HIPPOCAMPUS, labeled=labeled, unlabeled=unlabeled)
        return make_plans(nnSSLPlanner, NAME)["configurations"]["3d_fullres"]

    # 5 % of the voxels of 100 cases are 3.5 patches; nnU-Net alone would see one case, and plan its minimum of 2
    assert plans_of(1, 99)["batch_size"] == plans_of(100, 0)["batch_size"] == 4
    assert plans_of(1, 0)["batch_size"] == 2
    assert batch_sizes(plans_of(1, 99)) == (4, 4)


def test_numTraining_of_the_raw_data_set_stays(dataset):
    write_fingerprint(HIPPOCAMPUS, labeled=1, unlabeled=99)
    make_plans(nnSSLPlanner, NAME)
    assert (preprocessed_folder() / NAME / "dataset.json").read_text() == (dataset / "dataset.json").read_text()


def test_copy_of_a_read_only_dataset_json_can_be_renewed(dataset):
    write_fingerprint(HIPPOCAMPUS, labeled=1, unlabeled=9)
    (dataset / "dataset.json").chmod(0o444)
    make_plans(nnSSLPlannerCPU, NAME)
    assert (preprocessed_folder() / NAME / "dataset.json").stat().st_mode & 0o200


def test_spacing_is_that_of_all_cases(dataset):
    write_fingerprint(HIPPOCAMPUS, labeled=1, unlabeled=9, unlabeled_spacing=(1.5, 1.5, 1.5))
    assert make_plans(nnSSLPlannerCPU, NAME)["configurations"]["3d_fullres"]["spacing"] == [1.5, 1.5, 1.5]


@pytest.mark.parametrize("labeled", [1, 2])
@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
def test_one_or_two_cases_are_planned(dataset, planner, labeled):
    write_fingerprint(HIPPOCAMPUS, labeled=labeled, unlabeled=0)
    plans = make_plans(planner, NAME)
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [40, 56, 40]
    assert plans["configurations"]["3d_fullres"]["batch_size"] >= 2


def test_plans_are_valid_for_nnunet(dataset):
    write_fingerprint(HIPPOCAMPUS, labeled=2, unlabeled=8)
    plans = make_plans(nnSSLPlanner, NAME)
    copied = json.loads(json.dumps(plans))  # as the trainer writes them to the results folder
    manager = PlansManager(copied)
    assert manager.plans_name == "nnSSLPlans"
    assert set(manager.available_configurations) == {"2d", "3d_fullres"}
    for name in manager.available_configurations:
        configuration = manager.get_configuration(name)
        assert configuration.preprocessor_class.__name__ == "DefaultPreprocessor"
        assert configuration.data_identifier == f"nnSSLPlans_{name}"
        assert batch_sizes(configuration.configuration) == (configuration.batch_size, configuration.batch_size)
        get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            input_channels=1,
            output_channels=3,
        )
    assert copied["semi_supervised"] == {
        "gpu_memory_target_in_gb": 18.0,
        "memory_factor": 2.25,
        "num_labeled": 2,
        "num_unlabeled": 8,
    }


def test_memory_target_is_that_of_the_whole_step(dataset):
    write_fingerprint((80, 80, 80), labeled=50, unlabeled=150)
    set_num_training(dataset, 200)
    ours = make_plans(nnSSLPlanner, NAME, gpu_memory_target_in_gb=2.25)
    stock = make_plans(ExperimentPlanner, NAME, gpu_memory_target_in_gb=1.0)
    for name in ("2d", "3d_fullres"):
        assert shared_entries(ours["configurations"][name]) == shared_entries(stock["configurations"][name])
    assert np.prod(ours["configurations"]["3d_fullres"]["patch_size"]) < 80**3
    assert ours["semi_supervised"]["gpu_memory_target_in_gb"] == 2.25


@pytest.mark.parametrize(
    ("shape", "spacing", "patch"),
    [
        (HIPPOCAMPUS, (1.0, 1.0, 1.0), [40, 56, 40]),
        ((200, 200, 200), (1.0, 1.0, 1.0), [64, 64, 64]),
        ((40, 300, 300), (5.0, 1.0, 1.0), None),
        ((10, 114, 110), (10.0, 1.56, 1.56), None),
    ],
)
def test_cpu_preset_keeps_3d_patches_small(dataset, shape, spacing, patch):
    write_fingerprint(shape, spacing=spacing, labeled=4, unlabeled=96)
    plan = make_plans(nnSSLPlannerCPU, NAME)["configurations"]["3d_fullres"]
    assert np.prod(plan["patch_size"]) <= 300_000
    assert np.prod(plan["patch_size"]) >= 0.4 * min(300_000, np.prod(shape))
    assert patch is None or plan["patch_size"] == patch
    features = plan["architecture"]["arch_kwargs"]["features_per_stage"]
    assert features[0] == 8
    assert max(features) <= 80
    assert batch_sizes(plan) == (2, 2)
    assert plan["batch_size"] == 2


@pytest.mark.parametrize(("shape", "patch"), [((1, 1000, 1000), [256, 256]), ((1, 88, 80), [96, 80])])
def test_cpu_preset_keeps_2d_patches_small(dataset, shape, patch):
    write_fingerprint(shape, spacing=(999.0, 1.0, 1.0), labeled=4, unlabeled=96)
    plans = make_plans(nnSSLPlannerCPU, NAME)
    assert list(plans["configurations"]) == ["2d"]
    assert plans["configurations"]["2d"]["patch_size"] == patch
    assert plans["configurations"]["2d"]["batch_size"] == 2
    assert max(plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"]) <= 128


def test_cpu_preset_takes_a_memory_target(dataset):
    write_fingerprint((200, 200, 200), labeled=4, unlabeled=96)
    plans = make_plans(nnSSLPlannerCPU, NAME, gpu_memory_target_in_gb=0.5)
    assert np.prod(plans["configurations"]["3d_fullres"]["patch_size"]) < 0.6 * 64**3


def test_lowres_is_planned_for_large_images_and_dropped_when_no_longer_wanted(dataset):
    write_fingerprint((128, 128, 128), labeled=2, unlabeled=18)
    plans = make_plans(nnSSLPlannerCPU, NAME)
    assert set(plans["configurations"]) == {"2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"}
    cascade = PlansManager(plans).get_configuration("3d_cascade_fullres").configuration
    assert batch_sizes(cascade) == (2, 2)
    write_fingerprint(HIPPOCAMPUS, labeled=2, unlabeled=18)
    assert set(make_plans(nnSSLPlannerCPU, NAME)["configurations"]) == {"2d", "3d_fullres"}


def test_configurations_added_by_hand_are_kept(dataset):
    write_fingerprint(HIPPOCAMPUS, labeled=2, unlabeled=8)
    plans = make_plans(nnSSLPlannerCPU, NAME)
    plans["configurations"]["3d_mine"] = {"inherits_from": "3d_fullres", "batch_size": 3}
    plans["configurations"]["3d_fullres"]["batch_size"] = 77
    (preprocessed_folder() / NAME / "nnSSLCPUPlans.json").write_text(json.dumps(plans))
    again = make_plans(nnSSLPlannerCPU, NAME)["configurations"]
    assert again["3d_mine"] == {"inherits_from": "3d_fullres", "batch_size": 3}
    assert again["3d_fullres"]["batch_size"] == 2


def test_name_and_spacing_can_be_given(dataset):
    write_fingerprint(HIPPOCAMPUS, labeled=2, unlabeled=8)
    plans = make_plans(nnSSLPlannerCPU, NAME, overwrite_plans_name="mine", overwrite_target_spacing=[2.0, 1.0, 1.0])
    assert plans["plans_name"] == "mine"
    assert plans["configurations"]["3d_fullres"]["spacing"] == [2.0, 1.0, 1.0]
    assert plans["configurations"]["3d_fullres"]["data_identifier"] == "mine_3d_fullres"
    assert (preprocessed_folder() / NAME / "mine.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preprocessor_name": "NoSuch"}, "NoSuch"),
        ({"gpu_memory_target_in_gb": 0.0}, "positive"),
        ({"overwrite_target_spacing": [1.0, 1.0]}, "three"),
        ({"overwrite_target_spacing": [1.0, 1.0, -1.0]}, "three"),
    ],
)
def test_wrong_arguments_are_told(dataset, options, message):
    write_fingerprint(HIPPOCAMPUS, labeled=2, unlabeled=8)
    with pytest.raises(UserError, match=message):
        make_plans(nnSSLPlannerCPU, NAME, **options)


def test_fingerprint_of_stock_nnunet_is_refused(dataset):
    write_fingerprint(HIPPOCAMPUS, labeled=2, unlabeled=8)
    file = preprocessed_folder() / NAME / "dataset_fingerprint.json"
    content = json.loads(file.read_text())
    del content["provenance"]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="not made by nnssl"):
        make_plans(nnSSLPlannerCPU, NAME)


def test_planners_are_found_by_name():
    assert find_planner("nnSSLPlannerCPU") is nnSSLPlannerCPU
    assert find_planner("ExperimentPlanner") is ExperimentPlanner
    assert find_planner("nnUNetPlannerResEncXL") is nnUNetPlannerResEncXL


@pytest.mark.parametrize("name", ["nnSSLPlanerCPU", "np", "compute_new_shape"])
def test_unknown_planner_is_told(name):
    with pytest.raises(UserError, match="nnSSLPlannerResEncM") as error:
        find_planner(name)
    assert ("did you mean nnSSLPlannerCPU" in str(error.value)) is (name == "nnSSLPlanerCPU")


# the classes look alike and keep their order along the reader's last axis
IN_ORDER = {"labels": [1, 2], "overlap": 0.9, "votes": 4, "before": [0, 0, 4], "after": [0, 0, 0]}


@pytest.mark.parametrize(
    ("spacing", "transpose", "in_3d", "in_2d"),
    [((1.0, 1.0, 1.0), [0, 1, 2], [0, 1], [0]), ((1.0, 1.0, 3.0), [2, 0, 1], [1, 2], [0, 1])],
)
def test_mirrored_axes_are_those_of_the_preprocessed_arrays(dataset, spacing, transpose, in_3d, in_2d):
    write_fingerprint(HIPPOCAMPUS, spacing=spacing, labeled=4, unlabeled=8, pairs=[IN_ORDER])
    plans = make_plans(nnSSLPlannerCPU, NAME)
    assert plans["transpose_forward"] == transpose
    axes = {name: plan["semi_supervised"]["mirror_axes"] for name, plan in plans["configurations"].items()}
    assert axes == {"2d": in_2d, "3d_fullres": in_3d}
    evidence = plans["configurations"]["3d_fullres"]["semi_supervised"]["mirror_evidence"]
    assert [(kept["classes"], kept["in_order"], kept["of"]) for kept in evidence["kept"]] == [(["bright", "dim"], 4, 4)]


def test_all_axes_are_mirrored_without_classes_that_look_alike(dataset):
    write_fingerprint(HIPPOCAMPUS, labeled=4, unlabeled=8, pairs=[IN_ORDER | {"overlap": 0.2}])
    plans = make_plans(nnSSLPlanner, NAME)
    assert plans["configurations"]["3d_fullres"]["semi_supervised"]["mirror_axes"] == [0, 1, 2]
    assert plans["configurations"]["2d"]["semi_supervised"]["mirror_axes"] == [0, 1]


def test_a_cascade_mirrors_as_its_first_stages(dataset):
    write_fingerprint((128, 128, 128), labeled=2, unlabeled=18, pairs=[IN_ORDER])
    plans = PlansManager(make_plans(nnSSLPlannerCPU, NAME))
    for name in ("3d_fullres", "3d_lowres", "3d_cascade_fullres"):
        assert plans.get_configuration(name).configuration["semi_supervised"]["mirror_axes"] == [0, 1]


@pytest.mark.parametrize(("choice", "in_3d", "in_2d"), [("all", [0, 1, 2], [0, 1]), ("none", [], []), ((1,), [1], [0])])
def test_mirrored_axes_can_be_given(dataset, choice, in_3d, in_2d):
    write_fingerprint(HIPPOCAMPUS, labeled=4, unlabeled=8, pairs=[IN_ORDER])
    configurations = make_plans(nnSSLPlannerCPU, NAME, mirror_axes=choice)["configurations"]
    assert configurations["3d_fullres"]["semi_supervised"]["mirror_axes"] == in_3d
    assert configurations["2d"]["semi_supervised"]["mirror_axes"] == in_2d


def test_given_axes_of_2d_images_are_those_of_the_2d_patch(dataset):
    write_fingerprint((1, 88, 80), spacing=(999.0, 1.0, 1.0), labeled=4, unlabeled=8, pairs=[IN_ORDER])
    plans = make_plans(nnSSLPlannerCPU, NAME, mirror_axes=(0,))
    assert plans["configurations"]["2d"]["semi_supervised"]["mirror_axes"] == [0]
    assert make_plans(nnSSLPlannerCPU, NAME)["configurations"]["2d"]["semi_supervised"]["mirror_axes"] == [0]
    with pytest.raises(UserError, match="no axis 2"):
        make_plans(nnSSLPlannerCPU, NAME, mirror_axes=(2,))


def test_nnunets_planners_hold_no_axes(dataset):
    write_fingerprint(HIPPOCAMPUS, labeled=4, unlabeled=0, pairs=[IN_ORDER])
    set_num_training(dataset, 4)
    assert "semi_supervised" not in make_plans(ExperimentPlanner, NAME)["configurations"]["3d_fullres"]
    with pytest.raises(UserError, match="hold no axes to mirror"):
        make_plans(ExperimentPlanner, NAME, mirror_axes="none")
