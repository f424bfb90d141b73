"""A folder that another process works in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_HOLDER = """
import os, sys, time
from nnssl.utils.lock import only_process
with only_process(sys.argv[1], "trains this run"):
    worker = os.fork()
    if worker != 0:
        print(worker, flush=True)
    time.sleep(60)
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that holds the lock of the folder, and the number of a worker that it has forked."""
    process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    try:
        yield process, worker
    finally:
        for number in (process.pid, worker):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait(timeout=10)
        process.stdout.close()
