from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnssl.errors import UserError
from nnssl.inference.export import export_model
from nnssl.inference.models import find_model, open_model
from nnssl.inference.predictor import Predictor
from nnssl.utils.files import write_json
from tests.inference.model_folders import change_checkpoint, write_model
from tests.support.tiny import Tiny, save_model

CPU = torch.device("cpu")
MEAN_TEACHER = {"trainer": "MeanTeacher", "folds": (0, 1)}


class OwnNetwork(nnUNetTrainer):
    """The planned network with its logits doubled: the same weights, another function."""

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        network.register_forward_hook(lambda module, inputs, output: output * 2)
        return network


@pytest.fixture
def use_trainer(monkeypatch):
    """Makes a class the trainer of every name."""

    def use(trainer: type) -> None:
        for module in ("export", "predictor"):
            monkeypatch.setattr(f"nnssl.inference.{module}.get_trainer", lambda name: trainer)

    return use


def stock_logits(folder: Path, folds, monkeypatch) -> torch.Tensor:
    def look_up(name: str) -> type:
        assert name == "nnUNetTrainer"
        return nnUNetTrainer

    monkeypatch.setattr(predict_from_raw_data, "recursive_find_trainer_class_by_name", look_up)
    predictor = predict_from_raw_data.nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return logits(predictor)


def logits(predictor) -> torch.Tensor:
    size = (16, 20, 16) if len(predictor.configuration_manager.patch_size) == 3 else (2, 20, 16)
    return predictor.predict_logits_from_preprocessed_data(
        torch.randn(1, *size, generator=torch.Generator().manual_seed(1))
    )


@pytest.mark.parametrize(("dimensions", "mirroring"), [(3, (0, 1)), (2, ())])
def test_stock_predicts_with_the_exported_model(tmp_path, monkeypatch, use_trainer, dimensions, mirroring):
    use_trainer(nnUNetTrainer)
    model = open_model(write_model(tmp_path, Tiny(dimensions=dimensions), mirroring=mirroring, **MEAN_TEACHER))
    written = export_model(model, tmp_path / "out" / "model")
    ours = Predictor(device=CPU, precision="fp32", memory_format="contiguous", allow_tqdm=False)
    ours.initialize_from_model(model)
    assert torch.equal(stock_logits(written, (0, 1), monkeypatch), logits(ours))


def test_a_trained_mean_teacher(tmp_path, monkeypatch):
    tiny = Tiny().write(tmp_path, monkeypatch)
    trainer = tiny.trainer("MeanTeacher")
    trainer.train_step(tiny.batch())
    save_model(trainer)
    model = find_model(tiny.base.name)
    assert "MeanTeacher" in str(model)
    ours = Predictor(device=CPU, precision="fp32", memory_format="contiguous", allow_tqdm=False)
    ours.initialize_from_model(model)
    deployed = trainer.deployed_network().state_dict()
    assert all(torch.equal(value, deployed[key]) for key, value in ours.network.state_dict().items())
    written = export_model(model, tmp_path / "out")
    assert torch.equal(stock_logits(written, ("all",), monkeypatch), logits(ours))


def test_only_what_predicts_is_exported(tmp_path, use_trainer):
    use_trainer(nnUNetTrainer)
    folder = write_model(tmp_path, **MEAN_TEACHER)
    change_checkpoint(folder, semi_supervised={"student": {"a": torch.zeros(3)}})
    dataset_json = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(dataset_json | {"dataset": {"patient_7": {"images": ["/home/x"]}}}))
    written = export_model(open_model(folder), tmp_path / "out")
    content = torch.load(written / "fold_0" / "checkpoint_final.pth", weights_only=True)
    assert set(content) == {"network_weights", "trainer_name", "init_args", "inference_allowed_mirroring_axes"}
    assert content["trainer_name"] == "nnUNetTrainer"
    assert content["init_args"] == {"configuration": "3d_fullres", "fold": 0}
    assert json.loads((written / "dataset.json").read_text()) == dataset_json
    names = sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())
    assert names == [
        "dataset.json",
        "dataset_fingerprint.json",
        "fold_0/checkpoint_final.pth",
        "fold_1/checkpoint_final.pth",
        "plans.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Dataset901_Tiny", "out"]


def test_no_exported_file_names_a_case(tmp_path, use_trainer):
    use_trainer(nnUNetTrainer)
    folder = write_model(tmp_path, **MEAN_TEACHER)
    description = json.loads((folder / "dataset.json").read_text()) | {"name": "Hearts", "licence": "CC-BY"}
    cases = {
        "dataset": {"patient_7": {"images": ["a.nii.gz"], "label": "a.nii.gz"}},
        "training": [{"image": "imagesTr/patient_7.nii.gz"}],
        "provenance": {"source": "/home/patient_7", "labeled": ["patient_7"]},
    }
    write_json(description | cases, folder / "dataset.json")
    stock = {
        "spacings": [[1.0, 1.0, 1.0]],
        "shapes_after_crop": [[9, 9, 9]],
        "median_relative_size_after_cropping": 1.0,
        "foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}},
    }
    ours = {
        "class_places": {"boxes": {"patient_7": [[0.0, 1.0]] * 3}, "reference": "patient_7"},
        "provenance": {"groups": {"patient_7": "p"}, "labeled": {"patient_7": {}}},
    }
    write_json(stock | ours, folder / "dataset_fingerprint.json")
    for fold in (0, 1):
        arguments = {"configuration": "3d_fullres", "fold": fold, "dataset_json": description | cases}
        change_checkpoint(folder, fold, init_args=arguments, semi_supervised={"chosen": ["patient_7"]})
    written = export_model(open_model(folder), tmp_path / "out")
    naming = {path for path in tmp_path.rglob("*") if path.is_file() and b"patient_7" in path.read_bytes()}
    assert naming == {
        folder / name
        for name in (
            "dataset.json",
            "dataset_fingerprint.json",
            "fold_0/checkpoint_final.pth",
            "fold_1/checkpoint_final.pth",
        )
    }
    assert json.loads((written / "dataset.json").read_text()) == description
    assert json.loads((written / "dataset_fingerprint.json").read_text()) == stock


def test_a_chosen_checkpoint_becomes_the_final_one(tmp_path):
    folder = write_model(tmp_path, checkpoint="checkpoint_best.pth")
    written = export_model(open_model(folder, checkpoint="checkpoint_best.pth"), tmp_path / "out")
    assert (written / "fold_0" / "checkpoint_final.pth").is_file()


def test_zip_is_installed_by_stock(tmp_path, monkeypatch, use_trainer):
    use_trainer(nnUNetTrainer)
    folder = write_model(tmp_path / "results", **MEAN_TEACHER)
    written = export_model(open_model(folder), tmp_path / "model.zip", as_zip=True)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    from nnunetv2.model_sharing.model_import import install_model_from_zip_file

    install_model_from_zip_file(str(written))
    installed = tmp_path / "elsewhere" / "Dataset901_Tiny" / "nnUNetTrainer__nnSSLPlans__3d_fullres"
    assert stock_logits(installed, (0, 1), monkeypatch).shape == (2, 16, 20, 16)


def test_a_network_with_more_weights_is_refused(tmp_path):
    folder = write_model(tmp_path, trainer="MeanTeacher")
    weights = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    change_checkpoint(folder, network_weights=weights | {"vae.mean.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="another network than the planned one") as caught:
        export_model(open_model(folder), tmp_path / "out")
    assert "1 additional, such as vae.mean.weight" in str(caught.value)
    assert "nnssl_predict" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Dataset901_Tiny"]


def test_the_same_weights_in_another_function_are_refused(tmp_path, use_trainer):
    use_trainer(OwnNetwork)
    folder = write_model(tmp_path, trainer="MeanTeacher")
    with pytest.raises(UserError, match="computes something else"):
        export_model(open_model(folder), tmp_path / "out")


def test_preprocessing_that_stock_lacks_is_refused(tmp_path):
    plans = Tiny().plans()
    plans["configurations"]["3d_fullres"]["preprocessor_name"] = "MyOwnPreprocessor"
    folder = write_model(tmp_path, plans=plans)
    with pytest.raises(UserError, match="lacks the preprocessor"):
        export_model(open_model(folder), tmp_path / "out")


def test_a_fold_of_another_plan_is_not_exported_with_this_one(tmp_path):
    folder = write_model(tmp_path)
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["RescaleTo01Normalization"]
    write_json(plans, folder / "plans.json")
    with pytest.raises(UserError, match="another normalization_schemes"):
        export_model(open_model(folder), tmp_path / "out")


def test_nothing_is_overwritten(tmp_path):
    model = open_model(write_model(tmp_path))
    (tmp_path / "out").mkdir()
    export_model(model, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        export_model(model, tmp_path / "out")
    with zipfile.ZipFile(tmp_path / "model.zip", "w"):
        pass
    with pytest.raises(UserError, match="exists already"):
        export_model(model, tmp_path / "model.zip", as_zip=True)
    with pytest.raises(UserError, match="must end with"):
        export_model(model, tmp_path / "model", as_zip=True)
