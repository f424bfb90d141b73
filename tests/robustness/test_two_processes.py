"""Two processes in one run or one preprocessed folder: the second is told who is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.robustness.place import MODEL, PLAN, TRAIN_NEXT

HOLDER = """
import sys, time
from nnssl.utils.lock import only_process
with only_process(sys.argv[1], "works"):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def place(shared_place):
    return shared_place


@pytest.mark.parametrize(
    "command",
    [PLAN, TRAIN_NEXT, pytest.param(TRAIN_NEXT.replace("--epochs", "-num_gpus 2 --epochs"), marks=pytest.mark.slow)],
)
def test_the_second_is_refused_until_the_first_dies(place, capfd, command):
    run = place.model.with_name(MODEL.replace("Supervised", "MeanTeacher")) / "fold_1"
    folder = place.base if command == PLAN else run
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        before = place.contents()
        assert place.run(command) == 2
        message = capfd.readouterr().err
        assert f"another process {'plans or preprocesses this data set' if command == PLAN else 'trains this run'}" in (
            message
        )
        assert str(folder) in message
        assert f"process {process.pid}" in message
        assert "Traceback" not in message
        after = place.contents()
        assert {name: after.get(name) for name in before} == before
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
        process.stdout.close()
    assert place.run(command + (" --overwrite" if command != PLAN else "")) == 0
