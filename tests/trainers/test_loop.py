"""When a training saves, and what it prints."""

from __future__ import annotations

import re

import pytest
import torch

from nnssl.trainers.engine import loop
from tests.support.tiny import Tiny


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    yield Tiny().write(tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(False)


def steps_of_checkpoints(trainer, monkeypatch) -> list[int]:
    """Steps after which ``checkpoint_latest.pth`` is written in a training."""
    steps = []
    save = trainer.save_checkpoint

    def noted(file: str) -> None:
        if file.endswith(loop.LATEST):
            steps.append(trainer.iteration)
        save(file)

    monkeypatch.setattr(trainer, "save_checkpoint", noted)
    trainer.run_training()
    return steps


def test_a_checkpoint_every_ten_epochs(tiny, monkeypatch):
    trainer = tiny.trainer("Supervised", num_epochs=21, num_iterations_per_epoch=1)
    assert steps_of_checkpoints(trainer, monkeypatch) == [10, 20]


def test_a_checkpoint_within_a_long_epoch_when_time_is_over(tiny, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY_SECONDS", 0.0)
    trainer = tiny.trainer("Supervised", num_epochs=1, num_iterations_per_epoch=3)
    # before each step, and before the validation of the epoch
    assert steps_of_checkpoints(trainer, monkeypatch) == [0, 1, 2, 3]


def test_one_line_per_epoch_tells_losses_seconds_and_the_end(tiny, capsys):
    tiny.trainer("MeanTeacher").run_training()
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"epoch \d+/2:", line)]
    number = r"-?\d+\.\d+"
    for epoch, line in enumerate(lines, 1):
        assert re.fullmatch(
            rf"epoch {epoch}/2: loss {number} \(supervised {number}, consistency {number}\), val {number}, "
            rf"pseudo Dice {number}, {number} s/step \(data wait \d+%\), ETA \d+:\d\d:\d\d",
            line,
        )
    assert len(lines) == 2
    assert lines[-1].endswith("ETA 0:00:00")
