from __future__ import annotations

import json
import os
import signal
import subprocess

import pytest

from nnssl.benchmark.steps import STATE_FILE, Steps, run_command
from nnssl.errors import UserError

SETTINGS = {"seed": 0, "trainers": ["A"]}


def test_a_second_run_does_only_what_is_left(tmp_path):
    done = []
    first = Steps(tmp_path / "out", SETTINGS)
    first.run("one", lambda: done.append(1))
    with pytest.raises(ZeroDivisionError):
        first.run("two", lambda: 1 / 0)
    second = Steps(tmp_path / "out", SETTINGS)
    second.run("one", lambda: done.append(1))
    second.run("two", lambda: done.append(2))
    assert done == [1, 2]
    assert set(Steps(tmp_path / "out", SETTINGS).seconds) == {"one", "two"}


def test_other_settings_are_refused(tmp_path):
    Steps(tmp_path, SETTINGS).run("one", lambda: None)
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        Steps(tmp_path, {**SETTINGS, "seed": 1})
    assert json.loads((tmp_path / STATE_FILE).read_text())["settings"]["seed"] == 0


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("text")
    with pytest.raises(UserError, match="other files"):
        Steps(tmp_path, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_commands_get_the_environment_and_failures_name_the_command(tmp_path, capfd):
    run_command(["trainers", "--help"], {})
    shown = capfd.readouterr().out
    assert shown.startswith("$ nnssl_trainers --help\n")
    assert "usage: nnssl_trainers" in shown
    with pytest.raises(UserError, match=r"nnssl_predict -i 'a b'[\s\S]*exit code 2"):
        run_command(["predict", "-i", "a b"], {"nnUNet_raw": str(tmp_path)})


def test_an_interrupted_command_gets_the_time_to_save(monkeypatch):
    waits = []

    class Interrupted:
        def __init__(self, *_, **__):
            pass

        def wait(self):
            waits.append(len(waits))
            if len(waits) == 1:
                raise KeyboardInterrupt
            return 0

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_command(["train"], {})
    assert len(waits) == 2


def test_sigterm_is_passed_on_and_the_command_awaited(monkeypatch):
    events = []

    class Running:
        def __init__(self, *_, **__):
            pass

        def terminate(self):
            events.append("terminated")

        def wait(self):
            os.kill(os.getpid(), signal.SIGTERM)
            events.append("ended")
            return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(subprocess, "Popen", Running)
    run_command(["train"], {})
    assert events == ["terminated", "ended"]
    assert signal.getsignal(signal.SIGTERM) is before
