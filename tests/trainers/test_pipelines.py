"""The streams of a training, and what is said when they are too slow."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from nnssl.trainers.engine import loop
from nnssl.trainers.engine.pipelines import TrainingStream, worker_counts
from tests.support.tiny import Tiny


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    yield Tiny().write(tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(False)


class Counted:
    def __init__(self, key: str, seconds: float = 0.0):
        self.key = key
        self.seconds = seconds
        self.numbers = itertools.count()

    def __next__(self):
        time.sleep(self.seconds)
        return {self.key: next(self.numbers)}


def test_the_clock_tells_the_streams_apart():
    stream = TrainingStream(Counted("target"), Counted("data", seconds=0.05), [])
    next(stream)
    assert stream.waited["unlabeled"] >= 0.05 > stream.waited["labeled"]
    stream.restart_clock()
    assert stream.waited == {"labeled": 0.0, "unlabeled": 0.0}


def test_unlabeled_batches_begin_where_they_are_needed():
    stream = TrainingStream(Counted("target"), Counted("data"), [], labeled_only=2)
    batches = [next(stream) for _ in range(4)]
    assert [batch["unlabeled"] for batch in batches] == [None, None, 0, 1]
    assert [batch["target"] for batch in batches] == [0, 1, 2, 3]


def test_a_training_with_a_first_phase_sees_the_patches_of_one_without(tiny, monkeypatch):
    seen: dict[float, list[torch.Tensor | None]] = {}
    for share in (0.0, 0.5):
        trainer = tiny.trainer("MeanTeacher", pretrain_share=share)
        stream, validation = trainer.get_dataloaders()
        seen[share] = [next(stream)["unlabeled"] for _ in range(4)]
        stream.close()
        validation.close()
    assert seen[0.5][:2] == [None, None]
    assert all(torch.equal(a, b) for a, b in zip(seen[0.5][2:], seen[0.0][2:], strict=True))


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, {"labeled": 1, "unlabeled": 1, "validation": 1}),
        ("0", {"labeled": 0, "unlabeled": 0, "validation": 0}),
        ("9", {"labeled": 3, "unlabeled": 6, "validation": 2}),
    ],
)
def test_workers_on_a_cpu(tiny, monkeypatch, variable, expected):
    trainer = tiny.trainer("MeanTeacher")
    if trainer.device.type != "cpu":
        pytest.skip("about CPUs")
    if variable is None:
        monkeypatch.delenv("nnUNet_n_proc_DA")
    else:
        monkeypatch.setenv("nnUNet_n_proc_DA", variable)
        monkeypatch.setattr("os.cpu_count", lambda: 16)  # more workers than cores are never started
    assert worker_counts(trainer) == expected


@pytest.mark.parametrize(("share", "warned"), [(0.0, 0), (1.0, 1)])
def test_a_stream_that_starves_the_step_is_named_once(tiny, monkeypatch, capsys, share, warned):
    monkeypatch.setattr(loop, "STARVING_SHARE", 2.0 if share == 0.0 else 0.0)
    trainer = tiny.trainer("MeanTeacher")
    trainer.run_training()
    said = [line for line in capsys.readouterr().out.splitlines() if "wait" in line and "nnUNet_n_proc_DA" in line]
    assert len(said) == warned
    if warned:
        assert "labeled ones" in said[0]
        assert "now 0 worker processes" in said[0]
