"""Background processes whose death is noticed, and what runs in them: preprocessing and writing of single cases."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from nnssl.errors import UserError
from nnssl.inference.cases import InputCase
from nnssl.inference.completeness import is_nifti, nifti_fault, scan_fault
from nnssl.utils.disk import disk_errors_named

SCRATCH = ".tmp_predict"


class Result(Protocol):
    """A value that is there now or later."""

    def result(self) -> Any:
        """Waits for the value; raises what its computation raised."""


class Inline:
    """Stands in for a pool: computes in this process, when the result is asked for."""

    def submit(self, function: Callable, *arguments: Any) -> Result:
        return _Deferred(function, arguments)


class _Deferred:
    def __init__(self, function: Callable, arguments: tuple):
        self._function, self._arguments = function, arguments

    def result(self) -> Any:
        return self._function(*self._arguments)


@contextmanager
def worker_pool(processes: int) -> Iterator[ProcessPoolExecutor | Inline]:
    """Pool of spawned processes; with 0 everything runs in this process.

    A killed worker raises ``BrokenProcessPool`` at every open result. Work that has not begun when the block is left
    by an exception is dropped.
    """
    if processes == 0:
        yield Inline()
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class WorkerKilled(UserError):
    """A process of a pool is gone, and what it was at work on."""


class CaseQueue:
    """Work on cases that a pool does, and its results in the order in which the work was submitted.

    Args:
        pool: of `worker_pool`.
        step: what is done, for messages.
        fix: what helps if a process of the pool was killed.
    """

    def __init__(self, pool: ProcessPoolExecutor | Inline, step: str, fix: str):
        self._pool, self._step, self._fix = pool, step, fix
        self._open: deque[tuple[str, Result]] = deque()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def first(self) -> str:
        """The case whose result is the next one."""
        return self._open[0][0]

    def submit(self, case: str, function: Callable, *arguments: Any) -> None:
        """Asks for ``function(*arguments)``; ``WorkerKilled`` if the pool cannot work any more."""
        try:
            self._open.append((case, self._pool.submit(function, *arguments)))
        except BrokenProcessPool:
            raise self._killed(case) from None

    def take(self) -> Any:
        """Waits for the next result; raises what its computation raised, or ``WorkerKilled``."""
        try:
            return self._open[0][1].result()
        except BrokenProcessPool:
            raise self._killed() from None
        finally:
            self._open.popleft()

    def _killed(self, *submitted: str) -> WorkerKilled:
        cases = list(dict.fromkeys(case for case, _ in self._open)) or submitted
        return WorkerKilled(
            f"a background process was killed during {self._step}, most likely because the memory was used up",
            where=f"one of the cases {', '.join(cases)}",
            fix=self._fix,
        )


def most_open(processes: int) -> int:
    """Results that a pool may owe: what is faster than its processes must not fill the memory with logits."""
    return processes + 2 if processes else 0


def _end_with_parent() -> None:
    # Ctrl-C reaches the whole group; the parent decides what still has to be finished
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def preprocess_case(
    case: InputCase,
    previous_stage: Path | None,
    plans_manager: Any,
    configuration_manager: Any,
    dataset_json: dict,
    verbose: bool,
    not_finite_is_zero: bool,
) -> tuple[np.ndarray, dict]:
    """nnU-Net's preprocessing of one case.

    ``not_finite_is_zero`` lets the reader take NaN and infinite values of NIfTI files for 0.

    Returns:
        The network's input (C, X, Y, Z) as float32, with the previous stage's mask as one-hot channels at the end in
        a cascade, and the properties that the export needs.

    Raises:
        ValueError: if a file is damaged, or the image holds NaN or infinite values: both would make an empty or
            arbitrary mask without a word.
    """
    if fault := scan_fault(case.files, not_finite_is_zero=not_finite_is_zero):
        raise ValueError(fault)
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

    preprocessor = configuration_manager.preprocessor_class(verbose=verbose)
    files = [str(file) for file in case.files]
    mask = None if previous_stage is None else str(previous_stage)
    data, seg, properties = preprocessor.run_case(files, mask, plans_manager, configuration_manager, dataset_json)
    if previous_stage is not None:
        labels = plans_manager.get_label_manager(dataset_json).foreground_labels
        data = np.vstack((data, convert_labelmap_to_one_hot(seg[0], labels, data.dtype)))
    if not np.isfinite(data).all():
        raise ValueError("the image holds NaN or infinite values")
    return np.ascontiguousarray(data, dtype=np.float32), properties


def export_case(
    logits: np.ndarray,
    properties: dict,
    configuration_manager: Any,
    plans_manager: Any,
    dataset_json: dict,
    output: Path,
    name: str,
    save_probabilities: bool,
    members: Sequence[np.ndarray] = (),
) -> None:
    """nnU-Net's export of one case, made in a folder of its own inside ``output`` and moved when it is complete.

    The mask is moved last, so that a mask in ``output`` is whole and has its probabilities beside it. From the logits
    of ``members``, if there are any, the uncertainty of the case follows.
    """
    from nnunetv2.inference.export_prediction import export_prediction_from_logits

    scratch = output / SCRATCH / name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        mask = name + dataset_json["file_ending"]
        with disk_errors_named(scratch):
            export_prediction_from_logits(
                logits,
                properties,
                configuration_manager,
                plans_manager,
                dataset_json,
                str(scratch / name),
                save_probabilities,
            )
            check_written(scratch / mask)
        for file in sorted(scratch.iterdir(), key=lambda path: (path.name == mask, path.name)):
            with open(file, "rb") as written:
                os.fsync(written.fileno())
            os.replace(file, output / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):
            scratch.parent.rmdir()
    if members:
        from nnssl.inference.uncertainty import export_uncertainty

        managers = (configuration_manager, plans_manager, dataset_json)
        export_uncertainty(logits, members, properties, *managers, output, name)


def check_written(mask: Path) -> None:
    """``RuntimeError`` if a mask is not whole: SimpleITK cuts files off where the disk is full, and says nothing."""
    if not is_nifti(mask):
        return
    try:
        fault = nifti_fault(mask, thorough=False)
    except Exception as error:  # of many kinds, by what is left of the header
        fault = str(error)
    if fault:
        raise RuntimeError(f"{mask.name} was not written as a whole: {fault}")
