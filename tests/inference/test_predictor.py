from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl.errors import UserError
from nnssl.inference.predictor import Predictor
from nnssl.utils.files import read_json, write_json
from tests.inference.model_folders import change_checkpoint, write_model, write_scan
from tests.support.tiny import Tiny

CPU = torch.device("cpu")


@pytest.fixture
def stock_predictor(monkeypatch):
    """nnU-Net's own predictor; only its look-up is shortened, which imports all its trainers (15 s)."""
    monkeypatch.setattr(predict_from_raw_data, "recursive_find_trainer_class_by_name", lambda name: nnUNetTrainer)
    return predict_from_raw_data.nnUNetPredictor(device=CPU, allow_tqdm=False)


def ours(folder: Path, folds=None, **options) -> Predictor:
    predictor = Predictor(device=CPU, allow_tqdm=False, **{"precision": "fp32"} | options)
    predictor.initialize_from_trained_model_folder(folder, folds)
    return predictor


def logits(predictor, size=(20, 16, 16), channels=1) -> torch.Tensor:
    image = torch.randn((channels, *size), generator=torch.Generator().manual_seed(1))
    return predictor.predict_logits_from_preprocessed_data(image)


@pytest.mark.parametrize(
    ("tiny", "size", "mirroring"),
    [
        (Tiny(), (24, 20, 18), (0, 1, 2)),
        (Tiny(dimensions=2), (3, 24, 20), (0, 1)),
        (Tiny(channels=2, classes=3), (16, 16, 16), (0, 2)),
        (Tiny(regions=True), (16, 18, 16), None),
    ],
    ids=["3d", "2d", "two channels", "regions"],
)
def test_equals_stock_to_the_bit(tmp_path, stock_predictor, tiny, size, mirroring):
    folder = write_model(tmp_path, tiny, mirroring=mirroring)
    stock_predictor.initialize_from_trained_model_folder(str(folder), (0,))
    found = logits(ours(folder, memory_format="contiguous"), size, tiny.channels)
    expected = logits(stock_predictor, size, tiny.channels)
    assert found.std() > 0
    assert torch.equal(found, expected)
    faster = ours(folder)
    assert faster.memory_format == "channels_last"
    torch.testing.assert_close(logits(faster, size, tiny.channels), expected, rtol=2e-3, atol=2e-3)


def test_folds_are_averaged_as_by_stock(tmp_path, stock_predictor):
    folder = write_model(tmp_path, folds=(0, 1, 2))
    stock_predictor.initialize_from_trained_model_folder(str(folder), (0, 1, 2))
    together = logits(ours(folder, memory_format="contiguous"))
    assert torch.equal(together, logits(stock_predictor))
    assert not torch.equal(together, logits(ours(folder, 0, memory_format="contiguous")))


def test_the_network_holds_the_weights_of_the_first_fold(tmp_path):
    folder = write_model(tmp_path, folds=(0, 1))
    weights = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert all(torch.equal(value, weights[key]) for key, value in ours(folder).network.state_dict().items())


@pytest.mark.parametrize("mirroring", [None, (), []])
def test_no_mirroring(tmp_path, mirroring):
    folder = write_model(tmp_path, mirroring=mirroring)
    found = logits(ours(folder))
    assert torch.equal(found, logits(ours(folder, use_mirroring=False)))


def test_mirroring_is_used(tmp_path):
    folder = write_model(tmp_path)
    assert not torch.equal(logits(ours(folder)), logits(ours(folder, use_mirroring=False)))


def test_bf16_is_close_to_fp32(tmp_path):
    folder = write_model(tmp_path)
    exact, rounded = logits(ours(folder)).float(), logits(ours(folder, precision="bf16")).float()
    assert not torch.equal(exact, rounded)
    assert (exact.softmax(0) - rounded.softmax(0)).abs().max() < 0.05


def test_bf16_outputs_are_summed_in_float32(tmp_path):
    predictor = ours(write_model(tmp_path), precision="bf16")
    seen = []
    inner = predictor._internal_maybe_mirror_and_predict
    predictor._internal_maybe_mirror_and_predict = lambda x: seen.append(inner(x)) or seen[-1]
    logits(predictor)
    assert {output.dtype for output in seen} == {torch.float32}
    assert not predictor.network._forward_hooks


def test_all_threads_are_used_and_given_back(tmp_path, monkeypatch):
    predictor = ours(write_model(tmp_path))
    predictor._cpu_threads = 3
    before, seen = torch.get_num_threads(), []
    inner = predictor._internal_maybe_mirror_and_predict
    predictor._internal_maybe_mirror_and_predict = lambda x: seen.append(torch.get_num_threads()) or inner(x)
    logits(predictor)
    assert set(seen) == {3}
    assert torch.get_num_threads() == before


def test_weights_survive_a_change_of_the_file(tmp_path):
    folder = write_model(tmp_path)
    predictor = ours(folder)
    before = logits(predictor)
    file = folder / "fold_0" / "checkpoint_final.pth"
    with open(file, "r+b") as content:
        content.write(bytes(file.stat().st_size))
    assert torch.equal(logits(predictor), before)


def test_numbers_of_numpy_in_the_log_are_read(tmp_path):
    folder = write_model(tmp_path)
    content = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert isinstance(content["_best_ema"], np.float64)
    ours(folder)


def test_weights_of_another_network(tmp_path):
    folder = write_model(tmp_path)
    change_checkpoint(folder, network_weights={"strange.weight": torch.zeros(1)})
    with pytest.raises(UserError, match="do not fit the network of nnUNetTrainer"):
        ours(folder)


def test_folds_that_do_not_belong_together(tmp_path):
    folder = write_model(tmp_path, folds=(0, 1))
    change_checkpoint(folder, 1, inference_allowed_mirroring_axes=(1,))
    with pytest.raises(UserError, match="trained differently") as caught:
        ours(folder)
    assert "fold 1: ('nnUNetTrainer', '3d_fullres', (1,))" in str(caught.value)
    ours(folder, 1)


def test_unknown_trainer(tmp_path):
    folder = write_model(tmp_path)
    change_checkpoint(folder, trainer_name="NoSuchTrainer")
    with pytest.raises(UserError, match="NoSuchTrainer"):
        ours(folder)


def test_plans_of_another_training(tmp_path):
    folder = write_model(tmp_path)
    change_checkpoint(folder, init_args={"configuration": "3d_lowres"})
    with pytest.raises(UserError, match="does not belong to the checkpoint"):
        ours(folder)


def test_plans_that_a_later_training_has_replaced(tmp_path):
    folder = write_model(tmp_path)
    plans = read_json(folder / "plans.json")
    for configuration in plans["configurations"].values():
        configuration["spacing"] = [2.0, 2.0, 2.0]
    write_json(plans, folder / "plans.json")
    with pytest.raises(UserError, match=r"another spacing") as found:
        ours(folder)
    assert str(folder / "fold_0" / "checkpoint_final.pth") in str(found.value)


def test_deterministic_mode_stays(monkeypatch):
    """nnU-Net's predictor lets cuDNN choose its algorithms by timing."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    torch.use_deterministic_algorithms(True)
    try:
        Predictor(device=torch.device("cuda"))
        assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("step", [0, 1.5])
def test_step_size_out_of_range(step):
    with pytest.raises(UserError, match="step size"):
        Predictor(step, device=CPU)


def test_trainers_with_the_old_signature(tmp_path, monkeypatch):
    class Old:
        @staticmethod
        def build_network_architecture(name, arguments, imports, inputs, outputs, enable_deep_supervision):
            from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

            return get_network_from_plans(
                name, arguments, imports, inputs, outputs, deep_supervision=enable_deep_supervision
            )

    monkeypatch.setattr("nnssl.inference.predictor.get_trainer", lambda name: Old)
    folder = write_model(tmp_path)
    found = logits(ours(folder))
    monkeypatch.undo()
    assert torch.equal(found, logits(ours(folder)))


def test_scan_of_one_case_as_by_stock(tmp_path, stock_predictor):
    folder = write_model(tmp_path)
    scan = str(write_scan(tmp_path / "a_0000.nii.gz"))
    stock_predictor.initialize_from_trained_model_folder(str(folder), (0,))
    expected = stock_predictor.predict_from_files_sequential([[scan]], None)
    found = ours(folder).predict_from_files_sequential([[scan]], None)
    assert np.array_equal(found[0], expected[0])
    assert set(np.unique(found[0])) == {0, 1}
