"""From the flags of ``nnssl_train`` to a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nnssl.cli import run as run_command
from nnssl.errors import UserError
from nnssl.inference.checkpoint import read_model_checkpoint
from tests.support.tiny import PLANS, Tiny

BUDGET = ("--epochs", "2", "--iterations-per-epoch", "2", "--seed", "1")


@pytest.fixture(autouse=True)
def _keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    return Tiny().write(tmp_path, monkeypatch)


def _train(*flags: str) -> int:
    return run_command("train", ["901", *flags])


def _folder(tiny: Tiny, name: str = "Supervised", fold: str = "all") -> Path:
    return tiny.folder / "nnUNet_results" / "Dataset901_Tiny" / f"{name}__{PLANS}__3d_fullres" / f"fold_{fold}"


def test_a_run_leaves_everything_that_is_needed_to_repeat_and_predict(tiny, capsys):
    assert _train("MeanTeacher", "0", *BUDGET, "-device", "cpu", "--set", "consistency_weight=0.3") == 0
    folder = _folder(tiny, "MeanTeacher", "0")
    assert {"checkpoint_final.pth", "curves.csv", "progress.png", "run.json", "validation"} <= {
        p.name for p in folder.iterdir()
    }
    assert not (folder / "checkpoint_latest.pth").exists()
    record = json.loads((folder / "run.json").read_text())
    assert record["settings"]["seed"] == 1
    assert record["hyperparameters"]["consistency_weight"] == 0.3
    assert record["cases"] == {"labeled": tiny.labeled - 1, "unlabeled": tiny.unlabeled}
    assert record["hyperparameters"]["num_val_iterations_per_epoch"] == 1
    assert {"plans.json", "dataset.json"} <= {p.name for p in folder.parent.iterdir()}
    output = capsys.readouterr().out
    assert "epoch 2/2" in output
    assert "Mean Validation Dice" in output


def test_the_only_plans_are_taken_and_the_seed_is_recorded(tiny):
    assert _train("Supervised", "all", "--epochs", "1", "--iterations-per-epoch", "1") == 0
    assert isinstance(json.loads((_folder(tiny) / "run.json").read_text())["settings"]["seed"], int)


def test_what_is_set_comes_before_nnunets_proportions(tiny):
    flags = ("--epochs", "1", "--iterations-per-epoch", "10", "--seed", "0", "--set", "num_val_iterations_per_epoch=1")
    assert _train("Supervised", "all", *flags) == 0
    record = json.loads((_folder(tiny) / "run.json").read_text())
    assert record["hyperparameters"]["num_iterations_per_epoch"] == 10
    assert record["hyperparameters"]["num_val_iterations_per_epoch"] == 1


def test_a_trained_run_is_not_overwritten_unless_asked_for(tiny, capsys):
    assert _train("Supervised", "all", *BUDGET) == 0
    file = _folder(tiny) / "checkpoint_final.pth"
    before = file.read_bytes()
    assert _train("Supervised", "all", *BUDGET) == 2
    assert "has been trained before" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert _train("Supervised", "all", *BUDGET, "--overwrite") == 0


def test_a_training_that_cannot_begin_leaves_the_finished_one(tiny, monkeypatch, capsys):
    assert _train("Supervised", "all", *BUDGET) == 0
    files = [_folder(tiny) / name for name in ("checkpoint_final.pth", "run.json")]
    before = [file.read_bytes() for file in files]

    def too_large(trainer):
        raise UserError("does not fit")

    monkeypatch.setattr("nnssl.trainers.base.check_memory", too_large)
    assert _train("Supervised", "all", *BUDGET, "--overwrite") == 2
    assert "does not fit" in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == before


def test_weights_of_the_run_itself_are_not_overwritten(tiny, capsys):
    assert _train("Supervised", "all", *BUDGET) == 0
    weights = _folder(tiny) / "checkpoint_final.pth"
    assert _train("Supervised", "all", *BUDGET, "--overwrite", "-pretrained_weights", str(weights)) == 2
    assert "copy them first" in capsys.readouterr().err
    assert weights.is_file()


def test_pretrained_weights_are_recorded_with_their_whole_path(tiny, monkeypatch):
    assert _train("Supervised", "0", *BUDGET) == 0
    weights = _folder(tiny, fold="0") / "checkpoint_final.pth"
    monkeypatch.chdir(weights.parent)
    assert _train("Supervised", "1", *BUDGET, "-pretrained_weights", weights.name) == 0
    record = json.loads((_folder(tiny, fold="1") / "run.json").read_text())
    assert record["settings"]["pretrained_weights"] == str(weights)


def test_plans_of_finished_folds_are_not_replaced(tiny, capsys):
    assert _train("Supervised", "0", *BUDGET) == 0
    file = tiny.folder / "nnUNet_preprocessed" / "Dataset901_Tiny" / f"{PLANS}.json"
    model = _folder(tiny).parent / "plans.json"
    plans = json.loads(file.read_text())
    # intensities of the training cases, by which no image of this plan is normalized
    plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 7.0}}
    file.write_text(json.dumps(plans))
    assert _train("Supervised", "1", *BUDGET) == 0
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
    file.write_text(json.dumps(plans))
    kept = model.read_bytes()
    assert _train("Supervised", "all", *BUDGET) == 2
    error = capsys.readouterr().err
    assert "fold_0" in error
    assert "another normalization_schemes, another intensities" in error
    assert model.read_bytes() == kept
    assert _train("Supervised", "1", "--c") == 2
    assert "normalization_schemes of now" in capsys.readouterr().err


def test_a_diverged_network_does_not_replace_the_last_good_checkpoint(tiny, monkeypatch, capsys):
    from nnssl.trainers.base import SemiSupervisedTrainer

    monkeypatch.setattr("nnssl.trainers.engine.loop.SAVE_EVERY_SECONDS", 0.0)
    real = SemiSupervisedTrainer.train_step

    def diverge(self, batch):
        losses = real(self, batch)
        return {name: loss * float("nan") for name, loss in losses.items()} if self.iteration == 3 else losses

    monkeypatch.setattr(SemiSupervisedTrainer, "train_step", diverge)
    flags = ("--epochs", "1", "--iterations-per-epoch", "9", "--seed", "1")
    assert _train("Supervised", "all", *flags) == 2
    assert "the loss is not finite" in capsys.readouterr().err
    side = read_model_checkpoint(_folder(tiny) / "checkpoint_latest.pth")["semi_supervised"]
    assert side["iteration"] == 2


def test_continuing_takes_the_settings_of_the_run(tiny, monkeypatch, capsys):
    from nnssl.trainers.base import SemiSupervisedTrainer

    real = SemiSupervisedTrainer.train_step

    def stop_after_two(self, batch):
        losses = real(self, batch)
        if self.iteration == 2:
            Path(self.output_folder, "stop").touch()
        return losses

    monkeypatch.setattr(SemiSupervisedTrainer, "train_step", stop_after_two)
    with pytest.raises(SystemExit) as stopped:
        _train(
            "Supervised",
            "all",
            "--epochs",
            "3",
            "--iterations-per-epoch",
            "2",
            "--seed",
            "9",
            "--set",
            "initial_lr=0.5",
        )
    assert not stopped.value.code
    monkeypatch.setattr(SemiSupervisedTrainer, "train_step", real)
    assert _train("Supervised", "all", "--c", "--seed", "3", "--precision", "fp16", "--minutes", "5") == 0
    assert "--minutes, --seed, --precision: as in the run that is continued" in capsys.readouterr().out
    side = read_model_checkpoint(_folder(tiny) / "checkpoint_final.pth")["semi_supervised"]
    assert side["iteration"] == 6
    assert side["settings"]["seed"] == 9
    assert side["hyperparameters"]["initial_lr"] == 0.5


def test_micro_batches_are_recorded_and_may_change_when_a_training_goes_on(tiny, monkeypatch, capsys):
    assert _train("Supervised", "all", *BUDGET, "--micro-batch", "3") == 0
    assert json.loads((_folder(tiny) / "run.json").read_text())["settings"]["micro_batch"] == 3
    assert capsys.readouterr().out.count("memory of a step: about") == 1
    found = []
    monkeypatch.setattr(
        "nnssl.trainers.base.SemiSupervisedTrainer.perform_actual_validation",
        lambda self, save: found.append((self.settings.micro_batch, self.settings.memory_check)),
    )
    assert _train("Supervised", "all", "--c") == 0
    assert _train("Supervised", "all", "--c", "--micro-batch", "1", "--disable_memory_check") == 0
    assert found == [(3, True), (1, False)]


def test_validation_only(tiny, capsys):
    assert _train("Supervised", "0", *BUDGET) == 0
    summary = _folder(tiny, fold="0") / "validation" / "summary.json"
    summary.unlink()
    assert _train("Supervised", "0", "--val") == 0
    assert summary.is_file()
    assert _train("Supervised", "1", "--val") == 2
    assert "not finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("MeanTeecher", "0"), "did you mean MeanTeacher"),
        (("nnUNetTrainer", "0"), "nnUNetv2_train"),
        (("Supervised", "seven"), "not a fold"),
        (("Supervised", "0", "--micro-batch", "0"), "at least 1"),
        (("Supervised", "7"), "there is no fold 7"),
        (("Supervised", "0", "-c", "3d_lowres"), "3d_lowres is not planned"),
        (("Supervised", "0", "-p", "noPlans"), "noPlans.json"),
        (("Supervised", "0", "--set", "consistency_weight=1"), "no hyper-parameter"),
        (("MeanTeacher", "0", "--set", "consistency_weight=high"), "wrong value"),
        (("Supervised", "0", "--epochs", "0"), "at least 1"),
        (("Supervised", "0", "--set", "num_epochs=0"), "at least 1"),
        (("Supervised", "0", "--seed", "-1"), "from 0 on"),
        (("Supervised", "0", "--set", "num_val_iterations_per_epoch=0"), "at least 1"),
        (("Supervised", "0", "--c", "--val"), "give one of them"),
        (("Supervised", "0", "--c", "-pretrained_weights", "x.pth"), "weights of its own"),
        (("Supervised", "0", "--val_best", "--disable_checkpointing"), "--val_best"),
        (("Supervised", "0", "-num_gpus", "0"), "at least one process"),
        (("Supervised", "0", "-pretrained_weights", "missing.pth"), "checkpoint not found"),
        (("Supervised", "0", "--precision", "fp8"), "unknown precision"),
        (("Supervised", "0", "--memory-format", "upside_down"), "unknown memory format"),
        (("Supervised", "0", "-device", "cuda"), "cuda"),
    ],
)
def test_mistakes_end_with_one_message_and_code_2(tiny, capsys, flags, message):
    if flags[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert _train(*flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_missing_environment_variables_are_named(tiny, monkeypatch, capsys, variable):
    monkeypatch.delenv(variable)
    assert run_command("train", ["Dataset901_Tiny", "Supervised", "0"]) == 2
    assert variable in capsys.readouterr().err


def test_unknown_data_set(tiny, capsys):
    assert run_command("train", ["77", "Supervised", "0"]) == 2
    assert "no data set with id 77" in capsys.readouterr().err
