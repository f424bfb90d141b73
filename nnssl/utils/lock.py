"""A folder that only one process at a time works in."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from nnssl.errors import UserError

LOCK_FILE = ".lock"
_HELD_BY_ANOTHER = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def only_process(folder: str | os.PathLike[str], work: str, *, wait: bool = False) -> Iterator[None]:
    """Keeps other processes out of ``folder`` while the block runs.

    The lock belongs to the process: worker processes do not inherit it, and the operating system releases it when the
    process ends, however it ends. The file ``.lock`` stays; it says who held it last. Where the file system has no
    locks, or a file of another user would have to be waited for, that is told, and the block runs.

    Args:
        folder: is made if it is missing.
        work: what a process does there, such as "trains this run".
        wait: for another process to be done, which is told.

    Raises:
        UserError: if another process holds the lock and is not waited for; it names the folder and the process. If
            there is no right to write.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as opened:
        try:
            file = opened.enter_context(open(folder / LOCK_FILE, "a+", encoding="utf-8"))
        except PermissionError:
            if not wait:
                raise UserError(
                    "no right to write here", where=folder / LOCK_FILE, fix="ask its owner, or use a folder of your own"
                ) from None
            print(f"WARNING: no right to write {folder / LOCK_FILE}: {_unguarded(work)}", file=sys.stderr)
        else:
            _take(file, folder, work, wait)
        yield


def is_held(folder: str | os.PathLike[str]) -> bool:
    """Whether another process holds the lock of ``folder``; False where the file system has no locks."""
    path = Path(folder, LOCK_FILE)
    if not path.is_file():
        return False
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (*_HELD_BY_ANOTHER, *_NO_LOCKS_HERE):
                raise
            return error.errno in _HELD_BY_ANOTHER
    return False


def _take(file: IO[str], folder: Path, work: str, wait: bool) -> None:
    try:
        # not flock, whose locks live on in forked workers when their parent is killed
        _lock(file, f"another process {work}: {folder}", wait)
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            print(f"WARNING: the file system of {folder} has no locks: {_unguarded(work)}", file=sys.stderr)
        elif error.errno in _HELD_BY_ANOTHER:
            file.seek(0)
            raise UserError(
                f"another process {work}",
                where=folder,
                found=file.read().strip() or "a process that has just started",
                fix="wait until it is done, or end it",
            ) from None
        else:
            raise
    else:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def _unguarded(work: str) -> str:
    return f"see to it that no other process {work} at the same time"


def _lock(file: IO[str], held: str, wait: bool) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if not wait or error.errno not in _HELD_BY_ANOTHER:
            raise
        print(f"Waiting until it is done, {held}", flush=True)
        fcntl.lockf(file, fcntl.LOCK_EX)
