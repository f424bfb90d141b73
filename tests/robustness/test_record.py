"""``run.json`` holds what a run needs to be repeated, and repeating it gives the same network."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnssl.inference.checkpoint import read_model_checkpoint
from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.engine.record import git_state, hardware
from tests.robustness.place import BUDGET, MODEL, PLANS, Place


@pytest.fixture
def place(shared_place):
    return shared_place


def _record(place: Place, trainer: str = "Supervised", fold: int = 0) -> dict:
    return json.loads(
        (place.model.with_name(MODEL.replace("Supervised", trainer)) / f"fold_{fold}/run.json").read_text()
    )


def test_the_record_is_complete(place):
    record = _record(place)
    manifest = json.loads((place.base / "manifests" / f"{PLANS}_3d_fullres.json").read_text())["cases"]
    assert record["case_keys"]["train"] == {case: manifest[case]["content"] for case in ("l1", "l2")}
    assert record["case_keys"]["validation"] == {"l0": manifest["l0"]["content"]}
    unlabeled = json.loads((place.base / f"{PLANS}_3d_fullres_unlabeled" / "manifest.json").read_text())["cases"]
    assert record["case_keys"]["unlabeled"] == {case: unlabeled[case]["content"] for case in ("u0", "u1")}
    assert set(record["case_keys"]["unlabeled"]["u0"]) == {"image"}
    plan = json.loads((place.base / f"{PLANS}.json").read_text())
    assert record["plan"]["configurations"]["3d_fullres"] == plan["configurations"]["3d_fullres"]
    assert record["settings"]["seed"] == 0
    assert {"nnssl", "python", "torch", "nnunetv2", "blosc2", "SimpleITK"} <= set(record["versions"])
    assert record["machine"]["memory_gb"] > 0
    assert record["machine"]["processor"]
    assert record["command"] == sys.argv
    assert record["started"].endswith("+00:00")
    assert record["continued"] == []


def test_a_continued_run_keeps_the_command_it_began_with(place, monkeypatch):
    real = SemiSupervisedTrainer.train_step

    def stop(self, batch):
        Path(self.output_folder, "stop").touch()
        return real(self, batch)

    command = f"train 801 Supervised 1 -p {PLANS} {BUDGET}".replace("epoch 1", "epoch 2")
    monkeypatch.setattr(sys, "argv", ["first"])
    with monkeypatch.context() as patch:
        patch.setattr(SemiSupervisedTrainer, "train_step", stop)
        assert place.run(command) == 0
    monkeypatch.setattr(sys, "argv", ["second", "--c"])
    assert place.run(command + " --c") == 0
    record = _record(place, fold=1)
    assert record["command"] == ["first"]
    assert [(entry["command"], entry["step"]) for entry in record["continued"]] == [(["second", "--c"], 1)]


def test_weights_that_a_run_began_with_are_known_by_their_hash(place, monkeypatch):
    command = f"train 801 Supervised 2 -p {PLANS} {BUDGET} -pretrained_weights {place.checkpoint}"
    assert "pretrained_weights_sha256" not in _record(place)
    assert place.run(command) == 0
    expected = hashlib.sha256(place.checkpoint.read_bytes()).hexdigest()
    assert _record(place, fold=2)["pretrained_weights_sha256"] == expected


def test_a_run_is_repeated_from_its_record(place, monkeypatch):
    """With nothing but the record at hand."""
    file = place.model / "fold_0" / "checkpoint_final.pth"
    before = {key: value.clone() for key, value in read_model_checkpoint(file)["network_weights"].items()}
    record = _record(place)
    names = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch")
    settings = " ".join(f"--set {name}={record['hyperparameters'][name]}" for name in names)
    command = (
        f"train {record['dataset']} {record['trainer']} {record['fold']} -p {record['plans']} -device "
        f"{record['device']} --seed {record['settings']['seed']} {settings} --disable_memory_check --overwrite "
        f"--precision {record['settings']['precision']} --memory-format {record['settings']['memory_format']}"
    )
    torch.set_num_threads(record["machine"]["threads"])
    assert place.run(command) == 0
    after = read_model_checkpoint(file)["network_weights"]
    assert all(torch.allclose(before[key], after[key], atol=1e-5) for key in before)


def test_the_commit_of_a_checkout(tmp_path):
    package = tmp_path / "checkout" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert git_state(package) is None

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", str(package), *identity, *arguments], check=True, capture_output=True)

    git("init")
    assert git_state(package) is None, "an installed package below a checkout of something else"
    git("add", ".")
    git("commit", "-m", "x")
    state = git_state(package)
    assert state is not None
    assert len(state["commit"]) == 40
    assert state["changed"] is False
    (package / "__init__.py").write_text("x = 1\n")
    assert git_state(package) == state | {"changed": True}


def test_the_machine_is_named():
    assert {"platform", "processor", "cores", "usable_cores", "threads", "memory_gb"} == set(
        hardware(torch.device("cpu"))
    )
