from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import torch

from nnssl.errors import UserError
from nnssl.trainers.engine import precision as precision_module
from nnssl.trainers.engine.history import History, LossMeter, not_finite
from nnssl.trainers.engine.memory_format import measure_memory_formats
from nnssl.trainers.engine.precision import Precision, choose_precision
from nnssl.trainers.engine.state import seed_everything, seed_step
from nnssl.trainers.engine.stopping import StopRequest

CPU = torch.device("cpu")


def _draws() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_what_a_step_draws_depends_on_seed_and_iteration_only():
    draws = {}
    for seed, iteration in ((3, 0), (3, 1), (4, 0), (3, 256), (3, 0)):
        seed_step(seed, iteration, CPU)
        now = _draws()
        assert draws.setdefault((seed, iteration), now) == now
    assert len({value for values in draws.values() for value in values}) == 3 * 4


@pytest.mark.parametrize(("has_bf16", "name"), [(True, "bf16"), (False, "fp32")])
def test_automatic_precision_on_a_cpu_follows_its_instructions(monkeypatch, has_bf16, name):
    monkeypatch.setattr(precision_module, "cpu_has_bf16", lambda: has_bf16)
    assert choose_precision(CPU).name == name


def test_automatic_precision_elsewhere():
    assert choose_precision(torch.device("cuda")).name == "fp16"
    assert choose_precision(torch.device("mps")).name == "fp32"


@pytest.mark.parametrize(("device", "name"), [("cpu", "fp16"), ("mps", "bf16"), ("cpu", "fp8")])
def test_impossible_precision_is_refused(device, name):
    with pytest.raises(UserError):
        choose_precision(torch.device(device), name)


def test_autocast_computes_in_the_chosen_format():
    layer = torch.nn.Linear(2, 2)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        precision = Precision(name, "cpu")
        with precision.autocast():
            assert layer(torch.zeros(1, 2)).dtype == dtype
        assert precision.grad_scaler() is None
    # nnU-Net's online validation opens a context of its own on CUDA
    with torch.autocast("cpu", dtype=torch.bfloat16), Precision("fp32", "cpu").autocast():
        assert layer(torch.zeros(1, 2)).dtype == torch.float32


def test_measuring_memory_formats_changes_nothing():
    network = torch.nn.Sequential(torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.Conv3d(4, 2, 1))
    before = [p.clone() for p in network.parameters()]
    seed_everything(0)
    expected = torch.rand(3)
    seed_everything(0)
    seconds = measure_memory_formats(network, (1, 1, 8, 8, 8), CPU, Precision("fp32", "cpu"))
    assert set(seconds) == {"contiguous", "channels_last"}
    assert all(value > 0 for value in seconds.values())
    assert torch.equal(torch.rand(3), expected)
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_request_a_stop_and_are_given_back(tmp_path, number):
    before = signal.getsignal(number)
    with StopRequest(tmp_path / "stop") as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) == before


def test_a_second_interrupt_ends_at_once(tmp_path):
    with StopRequest(tmp_path / "stop") as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_stop_file_requests_a_stop_once(tmp_path):
    file = tmp_path / "stop"
    file.touch()
    with StopRequest(file) as stop:
        assert not stop, "a file left over from before is not a request"
        file.touch()
        assert stop
    assert not file.exists()


def test_loss_meter_means_and_state():
    meter = LossMeter()
    for value in (1.0, 2.0):
        meter.add({"supervised": torch.tensor(value, requires_grad=True), "consistency": torch.tensor(3 * value)})
    other = LossMeter()
    other.restore(meter.state())
    other.add({"supervised": torch.tensor(6.0), "consistency": torch.tensor(0.0)})
    assert meter.means() == {"supervised": 1.5, "consistency": 4.5}
    assert other.means() == {"supervised": 3.0, "consistency": 3.0}
    other.clear()
    assert other.means() == {}


def test_averaging_losses_over_ranks_keeps_their_order():
    meter = LossMeter()
    meter.average(lambda values: values)
    assert meter.means() == {}
    for value in (1.0, 2.0):
        meter.add({"supervised": torch.tensor(value), "consistency": torch.tensor(10 * value)})
    meter.add({"supervised": torch.tensor(6.0)})
    meter.average(lambda values: values + 1)
    assert meter.means() == {"supervised": 4.0, "consistency": 16.0}
    meter.add({"supervised": torch.tensor(0.0)})
    assert meter.means()["supervised"] == 3.0


def test_not_finite_names_the_culprits():
    assert not_finite({"a": 1.0, "b": float("nan"), "c": float("inf")}) == ["b", "c"]


def test_curves_keep_columns_that_come_and_go(tmp_path):
    history = History()
    history.append({"epoch": 0, "loss": 1.0})
    history.append({"epoch": 1, "loss": 0.5, "consistency": 0.1})
    history.write_csv(tmp_path / "curves.csv")
    assert (tmp_path / "curves.csv").read_text().splitlines() == ["epoch,loss,consistency", "0,1.0,", "1,0.5,0.1"]
