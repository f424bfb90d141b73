from __future__ import annotations

from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch

from nnssl.cli import run
from nnssl.inference.predictor import Predictor
from nnssl.inference.uncertainty import estimate_quality, further_networks, uncertainty_maps
from nnssl.networks.ensemble import Ensemble
from tests.inference.model_folders import change_checkpoint, read_mask, write_model, write_scan
from tests.support.tiny import Tiny

QUICK = ["-npp", "0", "-nps", "0", "-device", "cpu", "--precision", "fp32", "--disable_progress_bar"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def probabilities(*of_first_class: float) -> np.ndarray:
    """Two classes, voxels along the last axis."""
    values = np.array(of_first_class, np.float32).reshape(1, 1, 1, -1)
    return np.concatenate((values, 1 - values))


def test_maps():
    one, other = probabilities(1, 0.5, 1, 0.9), probabilities(1, 0.5, 0, 0.7)
    maps = uncertainty_maps([one, other])
    assert maps["entropy"].shape == (1, 1, 4)
    expected = -(0.8 * np.log2(0.8) + 0.2 * np.log2(0.2))
    np.testing.assert_allclose(maps["entropy"].ravel(), [0, 1, 1, expected], atol=1e-6)
    single = [-(p * np.log2(p) + (1 - p) * np.log2(1 - p)) for p in (0.9, 0.7)]
    np.testing.assert_allclose(maps["disagreement"].ravel(), [0, 0, 1, expected - np.mean(single)], atol=1e-6)
    assert set(uncertainty_maps([one])) == {"entropy"}


def test_entropy_of_many_classes_and_of_regions():
    np.testing.assert_allclose(uncertainty_maps([np.full((5, 1, 2, 2), 0.2)])["entropy"], 1, rtol=1e-6)
    regions = np.array([0.5, 1.0]).reshape(2, 1, 1, 1)
    assert uncertainty_maps([regions], regions=True)["entropy"].item() == pytest.approx(0.5)


def test_estimates_of_a_case():
    member = np.array([[0.1, 0.2, 0.9, 1.0], [0.9, 0.8, 0.1, 0.0]]).reshape(2, 1, 1, 4)
    mask = np.array([1, 1, 0, 0]).reshape(1, 1, 4)
    found = estimate_quality([member], mask, {1: [1]})
    assert found["estimated_dice"] == pytest.approx(2 * 1.7 / (2 + 1.8))
    assert (found["members"], found["agreement"]) == (1, None)
    shifted = member[..., [3, 0, 1, 2]]
    assert estimate_quality([member, shifted], mask, {1: [1]})["agreement"] == pytest.approx(2 * 1 / 4)
    sure = np.stack([mask == 0, mask == 1]).astype(float)
    assert estimate_quality([sure, sure], mask, {1: [1]}) == {
        "members": 2, "estimated_dice": 1, "mean_entropy": 0, "agreement": 1,
    }  # fmt: skip
    empty = estimate_quality([sure], np.zeros_like(mask), {1: [1]})
    assert (empty["estimated_dice"], empty["mean_entropy"]) == (None, None)


def test_further_networks_of_a_checkpoint():
    own = {"a": torch.zeros(2), "b": torch.ones(3)}
    other = {"a": torch.ones(2), "b": torch.ones(3)}
    side = {
        "student": other,
        "modules": {
            "teacher": {f"network.{name}": value for name, value in other.items()},
            "deployed": {f"network.{name}": value for name, value in own.items()},
            "wide": {"a": torch.ones(5), "b": torch.ones(3)},
            "discriminator": {"conv": torch.ones(2)},
            "empty": {},
        },
    }
    found = further_networks({"network_weights": own, "semi_supervised": side})
    assert [set(weights) for weights in found] == [{"a", "b"}] * 2
    assert further_networks({"network_weights": own}) == []
    assert further_networks({"network_weights": own, "semi_supervised": {"student": None}}) == []


def predict(*flags: object) -> int:
    return run("predict", [str(flag) for flag in [*flags, *QUICK]])


@pytest.fixture
def scans(tmp_path):
    for number, name in enumerate("ab"):
        write_scan(tmp_path / "in" / f"{name}_0000.nii.gz", seed=number)
    return tmp_path / "in"


def test_masks_stay_and_files_lie_on_them(scans, tmp_path, capsys):
    model = write_model(tmp_path / "results", folds=(0, 1))
    assert predict("-i", scans, "-o", tmp_path / "plain", "-m", model) == 0
    out = tmp_path / "out"
    assert predict("-i", scans, "-o", out, "-m", model, "--save_uncertainty") == 0
    assert "quality.csv" in capsys.readouterr().out
    for case in "ab":
        np.testing.assert_array_equal(
            read_mask(out / f"{case}.nii.gz"), read_mask(tmp_path / "plain" / f"{case}.nii.gz")
        )
        mask = sitk.ReadImage(str(out / f"{case}.nii.gz"))
        for kind in ("entropy", "disagreement"):
            image = sitk.ReadImage(str(out / "uncertainty" / f"{case}_{kind}.nii.gz"))
            assert image.GetSize() == mask.GetSize()
            assert image.GetSpacing() == pytest.approx(mask.GetSpacing())
            values = sitk.GetArrayFromImage(image)
            assert values.dtype == np.float32
            assert 0 <= values.min() < values.max() <= 1
    table = pd.read_csv(out / "uncertainty" / "quality.csv")
    assert set(table["case"]) == {"a", "b"}
    assert table["members"].tolist() == [2, 2]
    assert table["estimated_dice"].is_monotonic_increasing
    assert table[["mean_entropy", "agreement"]].notna().all(axis=None)


def test_a_teacher_beside_the_network_is_a_member(scans, tmp_path):
    model = write_model(tmp_path / "results")
    (file,) = model.glob("fold_0/*.pth")
    weights = torch.load(file, weights_only=False)["network_weights"]
    teacher = {f"network.{name}": value + 0.05 for name, value in weights.items()}
    alone = ["-i", scans / "a_0000.nii.gz", "-m", model, "--save_uncertainty", "-o"]
    assert predict(*alone, tmp_path / "alone") == 0
    change_checkpoint(model, semi_supervised={"modules": {"teacher": teacher}})
    assert predict(*alone, tmp_path / "both") == 0
    assert not (tmp_path / "alone" / "uncertainty" / "a_disagreement.nii.gz").exists()
    assert read_mask(tmp_path / "both" / "uncertainty" / "a_disagreement.nii.gz").max() > 0
    tables = [pd.read_csv(tmp_path / name / "uncertainty" / "quality.csv") for name in ("alone", "both")]
    assert [table["members"].item() for table in tables] == [1, 2]
    # the teacher changes the estimate, never the mask
    np.testing.assert_array_equal(*(read_mask(tmp_path / name / "a.nii.gz") for name in ("alone", "both")))


def test_continued_predictions_fill_the_table(scans, tmp_path, capsys):
    model = write_model(tmp_path / "results")
    out = tmp_path / "out"
    words = ["-i", scans, "-o", out, "-m", model, "--continue_prediction"]
    assert predict(*words) == 0
    assert predict(*words, "--save_uncertainty") == 0
    assert "2 cases written" in capsys.readouterr().out
    (out / "uncertainty" / "a.json").unlink()
    assert predict(*words, "--save_uncertainty") == 0
    assert "1 case written" in capsys.readouterr().out
    assert len(pd.read_csv(out / "uncertainty" / "quality.csv")) == 2


@pytest.mark.parametrize("tiny", [Tiny(dimensions=2), Tiny(regions=True)], ids=["2d", "regions"])
def test_planes_and_regions(tmp_path, tiny):
    model = write_model(tmp_path / "results", tiny, folds=(0, 1))
    write_scan(tmp_path / "in" / "a_0000.nii.gz", shape=(20, 18, 16))
    assert predict("-i", tmp_path / "in", "-o", tmp_path / "out", "-m", model, "--save_uncertainty") == 0
    values = read_mask(tmp_path / "out" / "uncertainty" / "a_entropy.nii.gz")
    assert values.shape == (20, 18, 16)
    assert 0 <= values.min() < values.max() <= 1


@pytest.mark.parametrize("compiled", [False, True])
def test_members_of_an_ensemble(tmp_path, compiled):
    predictor = Predictor(use_gaussian=False, device=torch.device("cpu"), precision="fp32", allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(write_model(tmp_path, mirroring=None), (0,))
    first, second = predictor.network, deepcopy(predictor.network)
    first.load_state_dict(predictor.list_of_parameters[0])
    for parameter in second.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    predictor.network = ensemble = Ensemble([first, second])
    predictor.list_of_parameters = [ensemble.state_dict()]
    if compiled:  # by nnU-Net, where the environment asks for it
        predictor.network = ensemble = torch.compile(ensemble, backend="eager")
    image = torch.randn((1, 16, 16, 16), generator=torch.Generator().manual_seed(1))
    logits, members = predictor.predict_members(image)
    assert torch.equal(logits, predictor.predict_logits_from_preprocessed_data(image))
    assert predictor.network is ensemble
    assert len(members) == 2
    mean = torch.stack([member.float().softmax(0) for member in members]).mean(0)
    # one window, equal weights, no mirroring; results of nnU-Net are in half precision
    torch.testing.assert_close(logits.float().softmax(0), mean, rtol=0, atol=2e-3)
    assert not torch.allclose(members[0], members[1])
