"""A training that is killed at a random moment and continued ends as the undisturbed one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nnssl.inference.checkpoint import read_model_checkpoint
from tests.support.tiny import PLANS, Tiny

BUDGET = ("--epochs", "24", "--iterations-per-epoch", "3", "--seed", "5", "--deterministic")


def _train(data: Tiny, name: str, results: Path, *flags: str) -> subprocess.Popen[str]:
    environment = os.environ | {"nnUNet_results": str(results), "nnUNet_n_proc_DA": "1"}
    command = [sys.executable, "-m", "nnssl", "train", "901", name, "all", "-p", PLANS, "-device", "cpu", *BUDGET]
    return subprocess.Popen(
        [*command, *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def _final_weights(results: Path, name: str) -> dict[str, torch.Tensor]:
    (file,) = results.glob(f"*/{name}__*/fold_all/checkpoint_final.pth")
    checkpoint = read_model_checkpoint(file)
    modules = checkpoint["semi_supervised"]["modules"]
    states = {"network": checkpoint["network_weights"], **modules}
    return {f"{part}.{key}": value.clone() for part, state in states.items() for key, value in state.items()}


def _wait_for_epoch(process: subprocess.Popen[str], epoch: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"epoch {epoch}/"):
            return
    pytest.fail(f"the training ended before epoch {epoch}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MeanTeacher", "SelfTraining"])
def test_killed_and_continued(name, tmp_path, monkeypatch):
    data = Tiny().write(tmp_path / "data", monkeypatch)
    _finish(_train(data, name, tmp_path / "whole"))

    moments = random.Random(name)
    results = tmp_path / "killed"
    process = _train(data, name, results)
    for epoch in sorted(moments.sample(range(1, 23), 2)):
        _wait_for_epoch(process, epoch)
        time.sleep(moments.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        process = _train(data, name, results, "--c")
    _finish(process)

    whole, killed = _final_weights(tmp_path / "whole", name), _final_weights(results, name)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[key], killed[key]) for key in whole)
    assert not list(results.rglob(".tmp_*"))


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_zero(tmp_path, monkeypatch):
    data = Tiny().write(tmp_path / "data", monkeypatch)
    process = _train(data, "MeanTeacher", tmp_path / "results")
    _wait_for_epoch(process, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "stopped by SIGTERM" in output
    assert list((tmp_path / "results").rglob("checkpoint_latest.pth"))
