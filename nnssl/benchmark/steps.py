"""Runs nnssl's commands one after the other in a folder, and remembers which of them are done."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnssl.errors import UserError
from nnssl.utils.files import read_json, write_json

STATE_FILE = "demo.json"


class Steps:
    """The finished steps of a run, kept in a file of its output folder, so that a second run does only the rest.

    Attributes:
        folder: output folder; it is created.
        seconds: duration of each finished step by name.

    Raises:
        UserError: if the folder holds files but no record, or the record of a run with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self.folder = folder
        self.seconds: dict[str, float] = {}
        self._settings = dict(settings)
        self._file = folder / STATE_FILE
        if self._file.is_file():
            record = read_json(self._file, fix=f"delete {folder} and run again")
            self._refuse_other_settings(record.get("settings", {}))
            self.seconds = dict(record.get("seconds", {}))
        elif folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                "the output folder holds other files",
                where=folder,
                fix="name a new or an empty folder with -o",
            )
        self._save()

    def run(self, name: str, action: Callable[[], object]) -> None:
        """Runs ``action`` unless the step ``name`` is done; the record is written when it has succeeded."""
        if name in self.seconds:
            print(f"\n{name}: done before", flush=True)
            return
        print(f"\n{name}", flush=True)
        start = time.monotonic()
        action()
        self.seconds[name] = time.monotonic() - start
        self._save()

    def _save(self) -> None:
        write_json({"settings": self._settings, "seconds": self.seconds}, self._file)

    def _refuse_other_settings(self, found: Mapping[str, Any]) -> None:
        different = [
            f"{name}: {found.get(name)} there, {value} now"
            for name, value in self._settings.items()
            if found.get(name) != value
        ]
        if different:
            raise UserError(
                "the output folder belongs to a run with other settings",
                where=self.folder,
                found="; ".join(different),
                fix="name another folder with -o, or delete this one",
            )


def run_command(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Runs ``nnssl_<words[0]> <other words>`` as a process of its own; as `run_program`."""
    _run(["-m", "nnssl", *words], "nnssl_" + shlex.join(words), environment)


def run_program(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Runs ``python <words>`` as a process of its own, after it has printed the command line.

    ``environment`` is added to that of this process. Ctrl-C and SIGTERM reach the command as well, and it is given the
    time to save its state. ``UserError`` if the command fails. Only for the main thread.
    """
    _run(words, "python " + shlex.join(words), environment)


def _run(words: Sequence[str], line: str, environment: Mapping[str, str]) -> None:
    print(f"$ {line}", flush=True)
    process = subprocess.Popen([sys.executable, *words], env={**os.environ, **environment})
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        code = process.wait()
    except BaseException:
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        raise UserError(
            "a command failed; its message is above",
            where=line,
            found=f"exit code {code}" if code > 0 else f"ended by signal {-code}",
            fix="run again to go on from here",
        )
