"""The main path by its commands, and the same data set in the hands of stock nnU-Net."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import SimpleITK as sitk
import torch

from nnssl.cli import run
from nnssl.dataset.phantom import make_phantom_dataset
from nnssl.errors import UserError
from nnssl.inference.output import RECORD
from nnssl.trainers import choosing
from nnssl.trainers.engine import budget, loop, registered_labels

NAME = "Dataset007_Phantom"
LABELED = 2


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """nnU-Net's folders with a phantom data set, planned and preprocessed by the command."""
    folder = tmp_path_factory.mktemp("main_path")
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (folder / variable).mkdir()
            patch.setenv(variable, str(folder / variable))
        # batches are made in this process: workers cost more to start than these patches
        patch.setenv("nnUNet_n_proc_DA", "0")
        threads = torch.get_num_threads()
        make_phantom_dataset(
            folder / "nnUNet_raw" / NAME, labeled=LABELED, unlabeled=2, test=1, shape=(16, 24, 24), seed=3
        )
        flags = ["-d", "7", "-pl", "nnSSLPlannerCPU", "-c", "3d_fullres", "-np", "1", "-npfp", "1"]
        assert run("plan_and_preprocess", flags) == 0
        yield folder
        torch.set_num_threads(threads)


def test_plan_train_predict_evaluate_export(planned, capsys):
    budget = ["--epochs", "1", "--iterations-per-epoch", "2", "--seed", "0", "-device", "cpu"]
    assert run("train", ["7", "MeanTeacher", "0", *budget]) == 0
    validation = planned / "nnUNet_results" / NAME / "MeanTeacher__nnSSLCPUPlans__3d_fullres/fold_0/validation"
    assert (validation / "summary.json").is_file()

    masks, raw = planned / "masks", planned / "nnUNet_raw" / NAME
    assert run("predict", ["-i", str(raw / "imagesTs"), "-o", str(masks), "-d", "7", "-device", "cpu"]) == 0
    assert run("evaluate", ["-gt", str(raw / "labelsTs"), "-pred", str(masks), "-np", "1"]) == 0
    summary = json.loads((masks / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 1
    assert 0 <= summary["foreground_mean"]["Dice"] <= 1

    assert run("export", ["-d", "7", "-tr", "MeanTeacher", "-o", str(planned / "exported")]) == 0
    (checkpoint,) = (planned / "exported").rglob("checkpoint_final.pth")
    exported = torch.load(checkpoint, map_location="cpu", weights_only=True)
    assert exported["trainer_name"] == "nnUNetTrainer"
    assert "semi_supervised" not in exported


def test_registered_labels_of_the_fold_begin_a_self_training_and_are_made_once(planned, capsys):
    budget = ["--epochs", "1", "--iterations-per-epoch", "2", "--seed", "0", "-device", "cpu"]
    flags = [*budget, "--set", "initial_pseudo_labels=registration", "--set", "rounds=1"]
    assert run("train", ["7", "SwitchedSelfTraining", "all", *flags]) == 0
    (folder,) = (planned / "nnUNet_preprocessed" / NAME / "registered_labels").iterdir()
    scans = sorted((planned / "nnUNet_raw" / NAME / "imagesUn").iterdir())
    masks = [folder / scan.name.replace("_0000", "") for scan in scans]
    assert all(sitk.GetArrayFromImage(sitk.ReadImage(str(mask))).any() for mask in masks)
    assert json.loads((folder / RECORD).read_text())["atlases"] == ["phantom_000", "phantom_001"]

    made = [mask.stat().st_mtime_ns for mask in masks]
    scans[1].touch()
    capsys.readouterr()
    assert run("train", ["7", "SwitchedSelfTraining", "all", *flags, "--overwrite"]) == 0
    assert "2 labeled cases are registered to 1 unlabeled ones" in capsys.readouterr().out
    again = [mask.stat().st_mtime_ns for mask in masks]
    assert (again[0] == made[0], again[1] == made[1]) == (True, False)

    # the case that fold 0 is validated on has no say in it; one of the scans is enough
    assert run("train", ["7", "SelfTraining", "0", *flags, "--set", "registered_cases=1"]) == 0
    (other,) = (one for one in folder.parent.iterdir() if one != folder)
    validation = json.loads((planned / "nnUNet_preprocessed" / NAME / "splits_final.json").read_text())[0]["val"]
    atlases = json.loads((other / RECORD).read_text())["atlases"]
    assert len(atlases) == 1
    assert not set(atlases) & set(validation)
    assert [mask.name in {file.name for file in other.iterdir()} for mask in masks].count(True) == 1


def test_a_scan_that_cannot_be_registered_is_left_out(planned, monkeypatch, capsys):
    real = registered_labels.predict_by_atlases

    def without_the_second(inputs, output, raw, options):
        assert len(inputs) == 2
        real(inputs[:1], output, raw, options)
        raise UserError("1 of 2 cases failed", found="it is black")

    shutil.rmtree(planned / "nnUNet_preprocessed" / NAME / "registered_labels", ignore_errors=True)
    monkeypatch.setattr(registered_labels, "predict_by_atlases", without_the_second)
    flags = ["--epochs", "1", "--iterations-per-epoch", "2", "--seed", "0", "-device", "cpu", "--overwrite"]
    flags += ["--set", "initial_pseudo_labels=registration", "--set", "rounds=1"]
    assert run("train", ["7", "SelfTraining", "all", *flags]) == 0
    out = capsys.readouterr().out
    assert "1 cases are left out" in out
    assert "it is black" in out

    def none(inputs, output, raw, options):
        raise UserError("all cases failed")

    shutil.rmtree(planned / "nnUNet_preprocessed" / NAME / "registered_labels")
    monkeypatch.setattr(registered_labels, "predict_by_atlases", none)
    assert run("train", ["7", "SelfTraining", "all", *flags]) == 2
    assert "all cases failed" in capsys.readouterr().err


def test_registration_that_would_take_all_minutes_is_refused_before_it_begins(planned, monkeypatch, capsys):
    folder = planned / "nnUNet_preprocessed" / NAME / "registered_labels"
    shutil.rmtree(folder, ignore_errors=True)
    monkeypatch.setattr(registered_labels, "default_processes", lambda: 1)
    # two labeled cases: 40 s for an unlabeled one, of which there are two
    monkeypatch.setattr(registered_labels, "expected_seconds", lambda shape: 20.0)
    flags = ["--minutes", "1", "--seed", "0", "-device", "cpu", "--overwrite"]
    flags += ["--set", "initial_pseudo_labels=registration", "--set", "rounds=1"]
    assert run("train", ["7", "SelfTraining", "all", *flags]) == 2
    error = capsys.readouterr().err
    assert "about 1 minutes for 2 cases" in error
    assert "--set registered_cases=1 or more --minutes" in error
    assert not list(folder.glob("*/*.nii.gz"))


def test_auto_registers_two_corresponding_cases_within_the_minutes(planned, monkeypatch, capsys):
    monkeypatch.setattr(choosing, "FEWEST_UNLABELED", 1)
    monkeypatch.setattr(choosing, "FEWEST_STEPS_REGISTERED", 1)
    monkeypatch.setattr(budget, "FEWEST_STEPS", 1)
    shutil.rmtree(planned / "nnUNet_preprocessed" / NAME / "registered_labels", ignore_errors=True)
    # the minutes are for the registration; the training is short, however fast the machine is
    monkeypatch.setattr(budget.Costs, "steps_within", lambda self, seconds: 4)
    monkeypatch.setattr(loop, "keep_deadline", lambda trainer: False)
    budget_flags = ["--minutes", "5", "--seed", "0", "-device", "cpu", "--overwrite"]
    assert run("train", ["7", "auto", "all", *budget_flags]) == 0
    out = capsys.readouterr().out
    assert "auto: SwitchedSelfTraining, initial_pseudo_labels=registration, rounds=1" in out
    assert any((planned / "nnUNet_preprocessed" / NAME / "registered_labels").glob("*/phantom_*.nii.gz"))
    raw = planned / "nnUNet_raw" / NAME
    assert run("predict", ["-i", str(raw / "imagesTs"), "-o", str(planned / "auto"), "-d", "7", "-tr", "auto"]) == 0


def test_a_labeled_case_more_costs_only_itself(planned, capsys):
    """A case that is labeled later is the only one that is preprocessed again."""
    raw = planned / "nnUNet_raw" / NAME
    case = sorted((raw / "imagesUn").iterdir())[0]
    name = case.name.removesuffix("_0000.nii.gz")
    case.rename(raw / "imagesTr" / case.name)
    label = sorted((raw / "labelsTr").iterdir())[0]
    (raw / "labelsTr" / f"{name}.nii.gz").write_bytes(label.read_bytes())
    description = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(description | {"numTraining": LABELED + 1}))
    capsys.readouterr()
    flags = ["-d", "7", "-pl", "nnSSLPlannerCPU", "-c", "3d_fullres", "-np", "1", "-npfp", "1"]
    assert run("plan_and_preprocess", flags) == 0
    assert "1 preprocessed, 3 unchanged" in capsys.readouterr().out


def test_stock_nnunet_trains_on_the_labeled_cases(planned, monkeypatch):
    from nnunetv2.run.run_training import get_trainer_from_args

    trainer = get_trainer_from_args("7", "3d_fullres", 0, plans_identifier="nnSSLCPUPlans", device=torch.device("cpu"))
    seen: set[str] = set()
    real = trainer.train_step
    monkeypatch.setattr(trainer, "train_step", lambda batch: (seen.update(batch["keys"]), real(batch))[1])
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 4, 1
    trainer.run_training()
    split = json.loads((planned / "nnUNet_preprocessed" / NAME / "splits_final.json").read_text())[0]
    assert seen
    assert seen <= set(split["train"])
    assert Path(trainer.output_folder, "checkpoint_final.pth").is_file()
