from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from nnssl.errors import UserError
from nnssl.utils.lock import LOCK_FILE, is_held, only_process
from tests.support.locks import held_by_another


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock, and the number of its forked worker."""
    with held_by_another(tmp_path) as holder:
        yield holder


def test_a_second_process_is_told_who_is_there(tmp_path, holder):
    with pytest.raises(UserError) as refusal, only_process(tmp_path, "trains this run"):
        pytest.fail("the lock was given twice")
    assert "another process trains this run" in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)
    assert f"process {holder[0].pid} on " in str(refusal.value)


def test_a_killed_process_holds_nothing_though_its_worker_lives(tmp_path, holder):
    process, worker = holder
    assert is_held(tmp_path)
    process.kill()
    process.wait(timeout=10)
    os.kill(worker, 0)  # alive
    assert not is_held(tmp_path)
    with only_process(tmp_path, "trains this run"):
        assert f"process {os.getpid()} on " in (tmp_path / LOCK_FILE).read_text()


def test_who_waits_is_told_and_goes_on(tmp_path, holder, capsys):
    end = threading.Timer(3, holder[0].kill)
    end.start()
    with only_process(tmp_path, "registers labeled cases", wait=True):
        assert end.finished.is_set()
    assert f"Waiting until it is done, another process registers labeled cases: {tmp_path}" in capsys.readouterr().out


def test_a_folder_that_nobody_worked_in_is_not_held(tmp_path):
    assert not is_held(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nobody_waits_for_a_free_lock(tmp_path, capsys):
    with only_process(tmp_path, "works", wait=True):
        pass
    assert not capsys.readouterr().out


def test_the_lock_is_free_after_the_block(tmp_path):
    for _ in range(2):
        with only_process(tmp_path / "new" / "folder", "works"):
            pass
    code = "import sys; from nnssl.utils.lock import only_process\nwith only_process(sys.argv[1], 'works'): print('in')"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "new" / "folder")], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == "in\n", result.stderr


@pytest.fixture
def of_another_user(tmp_path, monkeypatch):
    """A lock file that may be read only, also for root, whom no file mode keeps out."""
    file = tmp_path / LOCK_FILE
    file.touch()

    def refuse(path, mode="r", **options):
        if Path(path) == file and mode != "r":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, mode, **options)

    monkeypatch.setattr("nnssl.utils.lock.open", refuse, raising=False)


@pytest.mark.usefixtures("of_another_user")
def test_a_lock_of_another_user(tmp_path, capsys):
    assert not is_held(tmp_path)
    with only_process(tmp_path, "chooses", wait=True):
        assert "see to it that no other process chooses at the same time" in capsys.readouterr().err
    with pytest.raises(UserError, match="no right to write here"), only_process(tmp_path, "trains this run"):
        pytest.fail("ran without lock")


def test_what_is_no_folder_is_not_held(tmp_path):
    (tmp_path / "fold_0.zip").touch()
    assert not is_held(tmp_path / "fold_0.zip")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with only_process(tmp_path, "works"):
        pass
    assert "has no locks" in capsys.readouterr().err
    assert not is_held(tmp_path)


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", broken)
    with pytest.raises(OSError, match="Input/output"), only_process(Path(tmp_path), "works"):
        pytest.fail("ran without lock")
    with pytest.raises(OSError, match="Input/output"):
        is_held(tmp_path)
