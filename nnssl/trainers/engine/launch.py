"""Starts the processes of a training on one machine and watches over them."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch.distributed as dist
import torch.multiprocessing

from nnssl.errors import UserError
from nnssl.trainers.engine.distributed import Ranks, failure_in, joined

GRACE_SECONDS = 10.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def launch(function: Callable[..., None], arguments: tuple, size: int, start_method: str = "spawn") -> None:
    """Runs ``function(*arguments)`` in ``size`` new processes, which are the ranks of one training.

    SIGTERM and Ctrl-C are passed on to all of them. When one ends with an error or is killed, the others are ended
    too; what the first of them has to say is told once.

    Args:
        function: of a module, so that it can be imported in the new processes.
        arguments: what can be pickled.
        size: number of processes.
        start_method: of Python's multiprocessing; fork is quicker, and works where no CUDA device is in use.

    Raises:
        UserError: what the rank that failed first has raised, or that a rank was killed.
        SystemExit: after any other error of a rank, whose traceback has been printed.
        KeyboardInterrupt: if the ranks were interrupted before they could stop in an orderly way.
    """
    # kept here and not in a rank, so that it outlives each of them
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = torch.multiprocessing.start_processes(
        _run_rank, (size, store.port, function, arguments), nprocs=size, join=False, start_method=start_method
    )
    processes = started.processes
    with _passed_on(processes) as signals:
        culprit = _first_to_fail(processes)
    if culprit is not None:
        _tell(culprit, processes[culprit].exitcode or 0, signals, failure_in(store))


def _run_rank(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple) -> None:
    # Ctrl-C in a terminal reaches a whole process group; here it is the launcher that passes it on, once
    os.setpgid(0, 0)
    if sys.platform == "linux":
        # all ranks are on this machine, so that nothing of the training needs to be open to the network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    try:
        with joined(Ranks(rank, size, rank, size, store)):
            function(*arguments)
    except UserError:
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # its traceback is in the store, and printed by the launcher
        sys.exit(1)


def _first_to_fail(processes: list[BaseProcess]) -> int | None:
    """Waits until all processes have ended; the number of the one that failed first, after which all are ended."""
    culprit: int | None = None
    deadline = 0.0
    running = dict(enumerate(processes))
    while running:
        connection.wait([p.sentinel for p in running.values()], None if culprit is None else 0.2)
        ended = [rank for rank, process in running.items() if not process.is_alive()]
        failed = [rank for rank in ended if processes[rank].exitcode]
        for rank in ended:
            del running[rank]
        if failed and culprit is None:
            # one that was killed is the cause; the others have then lost contact with it
            culprit = min(failed, key=lambda rank: (processes[rank].exitcode or 0) > 0)
            deadline = time.monotonic() + GRACE_SECONDS
        if culprit is not None and time.monotonic() > deadline:
            for process in running.values():
                process.kill()
    return culprit


@contextmanager
def _passed_on(processes: list[BaseProcess]) -> Iterator[list[int]]:
    """Passes signals on to the processes, and lists those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        for process in processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread
        yield came
        return
    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(rank: int, code: int, signals: list[int], report: str | None) -> None:
    """Raises what the user needs to know of a training whose process ``rank`` ended with ``code``."""
    if code == 130 or -code in signals:
        if signal.SIGINT in signals:
            raise KeyboardInterrupt
        raise SystemExit(128 + signal.SIGTERM)
    if code < 0:
        raise UserError(
            f"process {rank} of the training was killed ({signal.Signals(-code).name}), and the others were ended",
            fix="most often the machine ran out of memory: close other programs, then continue with --c",
        )
    if code == 2 and report is not None:
        raise UserError(report)
    print(report or f"process {rank} of the training ended with exit code {code}", file=sys.stderr)
    raise SystemExit(1)
