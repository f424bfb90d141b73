"""One function over many cases in worker processes; a worker that dies names the case it worked on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Mapping
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from tqdm import tqdm

from nnssl.errors import UserError
from nnssl.utils.disk import told_system_error

Result = TypeVar("Result")


def map_cases(
    function: Callable[..., Result],
    arguments: Mapping[str, tuple[Any, ...]],
    *,
    num_processes: int,
    description: str,
    hidden: bool = False,
) -> dict[str, Result]:
    """``{case: function(*arguments[case])}`` in the order of ``arguments``.

    A progress bar is shown on a terminal unless it is ``hidden``.

    ``function``, arguments and results must be picklable. With ``num_processes`` <= 1 all runs in this process;
    otherwise in that many spawned workers (never forked: a fork of a process with threads can hang).

    ``UserError`` if a worker dies (out of memory, killed), naming the case; an exception of ``function`` is raised as
    ``RuntimeError`` with the case and the traceback of the worker, a ``UserError`` of it as it is.
    """
    results: dict[str, Result] = {}
    outcomes = _outcomes(function, arguments, min(num_processes, len(arguments)))
    bar = tqdm(total=len(arguments), desc=description, unit="case", disable=True if hidden else None)
    # closing ends the workers at once when an exception leaves the loop
    with contextlib.closing(outcomes), bar as progress:
        for case, outcome in outcomes:
            if isinstance(outcome, UserError):
                raise outcome
            if isinstance(outcome, _Failure):
                raise RuntimeError(f"{description} failed at case {case}\n{outcome.traceback}")
            results[case] = outcome
            progress.update()
    return {case: results[case] for case in arguments}


def default_processes() -> int:
    """nnU-Net's number (8, or ``$nnUNet_def_n_proc``), at most one per core."""
    from nnunetv2.configuration import default_num_processes

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(default_num_processes, cores)


class _Failure:
    """Traceback text of an exception that ``function`` raised."""

    def __init__(self, traceback_text: str):
        self.traceback = traceback_text


def _outcomes(
    function: Callable[..., Any], arguments: Mapping[str, tuple[Any, ...]], num_processes: int
) -> Generator[tuple[str, Any], None, None]:
    if num_processes <= 1:
        for case, values in arguments.items():
            yield case, _call(function, values)
        return
    waiting = iter(arguments.items())
    workers: dict[Connection, BaseProcess] = {}
    at_work: dict[Connection, str] = {}
    try:
        for _ in range(num_processes):
            connection, worker = _start_worker(function)
            workers[connection] = worker
            case, values = next(waiting)
            _send(connection, values)
            at_work[connection] = case
        while at_work:
            for ready in wait(list(at_work)):
                connection = ready  # type: ignore[assignment]  # only connections were given to wait
                case = at_work.pop(connection)
                yield case, _receive(connection, workers[connection], case)
                following = next(waiting, None)
                if following is not None:
                    at_work[connection] = following[0]
                    _send(connection, following[1])
    finally:
        for connection, worker in workers.items():
            connection.close()
            worker.terminate()
        for worker in workers.values():
            worker.join()


def _start_worker(function: Callable[..., Any]) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    worker = context.Process(target=_serve, args=(theirs, function), daemon=True)
    worker.start()
    # with the worker's end closed here, the death of the worker is seen as the end of the stream
    theirs.close()
    return ours, worker


def _send(connection: Connection, values: tuple[Any, ...]) -> None:
    # a worker that is already dead is reported by _receive, with its exit code
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(values)


def _receive(connection: Connection, worker: BaseProcess, case: str) -> Any:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        worker.join()
        code = worker.exitcode or 0
        killed = f"killed by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return UserError(
            "a worker process died",
            where=f"case {case}",
            found=killed,
            fix="usually the memory is used up: use fewer processes (-np), and check that the case is not oversized",
        )


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    # Ctrl-C reaches the whole process group; the parent ends the workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        try:
            values = connection.recv()
        except EOFError:
            return
        connection.send(_call(function, values))


def _call(function: Callable[..., Any], values: tuple[Any, ...]) -> Any:
    try:
        return function(*values)
    except UserError as error:
        return error
    except Exception as error:
        return told_system_error(error) or _Failure(traceback.format_exc())
