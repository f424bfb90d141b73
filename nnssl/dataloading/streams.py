"""Endless streams of batches in which row j of batch i depends on the seed, on i and on j alone.

The cases of a batch are drawn under random generators seeded with (seed, stream, index), each of its rows under
generators seeded with (seed, stream, index, position). The same index therefore gives the same batch whatever the
number of workers, and whatever the number of processes that share the batch by making some of its rows each. A resumed
training continues a stream exactly by starting it at the next index: no sampler state has to be saved.
"""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from multiprocessing.util import Finalize
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from nnssl.errors import UserError

PREFETCHED_BATCHES = 3


class BatchSource(Protocol):
    """What a stream needs; `RowsLoader` and `UnlabeledLoader` have it.

    The position of a row in the whole batch is announced before anything is drawn for it.
    """

    def generate_train_batch(self, announce: Callable[[int], None]) -> dict[str, Any]: ...

    def get_indices(self) -> list[str]:
        """Cases of the rows, the first that is drawn for a batch."""
        ...


class SeededBatches(Dataset):
    """Batches by index, each of their rows drawn under its own seed.

    Args:
        source: draws and augments a batch, or some rows of it, with the global generators of Python, NumPy and torch.
        name: stream name; streams with different names draw independently.
        seed: run seed.
    """

    def __init__(self, source: BatchSource, name: str, seed: int):
        self.source = source
        self.name = name
        self.seed = seed

        # the batch that each worker makes, or made last
        self.at_work: Any = None

    def __getitem__(self, index: int) -> dict[str, Any]:
        worker = get_worker_info()
        if worker is not None and self.at_work is not None:
            self.at_work[worker.id] = index
        with own_generators():
            self._seed(index)
            # counted from 1: a last 0 would not change the seed
            return self.source.generate_train_batch(lambda position: self._seed(index, position + 1))

    def cases(self, index: int) -> list[str]:
        """Cases whose patches make up a batch, which is not made."""
        with own_generators():
            self._seed(index)
            return list(self.source.get_indices())

    def _seed(self, *entropy: int) -> None:
        seed_generators(self.seed, int.from_bytes(self.name.encode(), "little"), *entropy)


class BatchStream:
    """Iterator over the batches of a `SeededBatches` from ``start`` on, made ahead of time by worker processes.

    Args:
        batches: the batches.
        start: index of the first one.
        num_workers: processes that augment; 0 makes batches in this process when they are asked for.
        pin_memory: whether batches are put into page-locked memory (CUDA).
    """

    def __init__(self, batches: SeededBatches, start: int, num_workers: int, pin_memory: bool = False):
        self.name = batches.name
        self._batches = batches
        batches.at_work = RawArray("q", [-1] * max(1, num_workers))
        self._loader = DataLoader(
            batches,
            batch_size=None,
            sampler=_CountFrom(start),
            num_workers=num_workers,
            prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            # its own, because starting an iterator draws a number, which would shift the generator of the training
            generator=torch.Generator(),
        )
        with _same_handler_of_ended_children():
            self._iterator = iter(self._loader)
        # workers ignore SIGTERM (see _start_worker), by which multiprocessing would end them when this process exits
        self._end_workers = Finalize(self, _kill, args=(getattr(self._iterator, "_workers", []),), exitpriority=100)

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> dict[str, Any]:
        try:
            return next(self._iterator)
        # a batch that a worker had finished cannot be fetched either once it is dead
        except (RuntimeError, OSError, EOFError) as error:
            lines = str(error).strip().splitlines()
            if lines and lines[0].startswith("Caught"):
                raise UserError(f"the {self.name} stream stopped", found=lines[-1]) from error
            dead = self._dead_workers()
            if not dead and "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"a worker process of the {self.name} stream died",
                found=lines[0] if lines else type(error).__name__,
                where=self._work_of(dead),
                fix="most often the machine ran out of memory: set the environment variable nnUNet_n_proc_DA=1, "
                "close other programs, then continue with --c",
            ) from error

    def _dead_workers(self) -> list[int]:
        workers = getattr(self._iterator, "_workers", [])
        if not workers:
            return []
        # the end of its connections is seen some moments before a process is known to have ended
        ended = wait([worker.sentinel for worker in workers], timeout=5)
        return [number for number, worker in enumerate(workers) if worker.sentinel in ended]

    def _work_of(self, workers: list[int]) -> str | None:
        at_work = [self._batches.at_work[number] for number in workers]
        cases = dict.fromkeys(str(case) for index in at_work if index >= 0 for case in self._batches.cases(index))
        return f"it made, or had just made, patches of {', '.join(cases)}" if cases else None

    def close(self) -> None:
        """Ends the worker processes."""
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
        self._end_workers()


class _CountFrom:
    """Sampler 'start, start + 1, ...'."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


@contextmanager
def _same_handler_of_ended_children() -> Iterator[None]:
    """Takes away the handler by which torch raises wherever the main process is when a worker has died.

    The batch that is missing is found missing when it is asked for, which can be told as one message.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    if signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


def _kill(workers: list[BaseProcess]) -> None:
    for worker in workers:
        worker.kill()
        worker.join()


def _start_worker(worker_id: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the trainer alone decides when to end
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def seed_generators(*entropy: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators."""
    python_seed, numpy_seed, torch_seed = (int(word) for word in np.random.SeedSequence(entropy).generate_state(3))
    random.seed(python_seed)
    np.random.seed(numpy_seed)
    torch.random.default_generator.manual_seed(torch_seed)


@contextmanager
def own_generators() -> Iterator[None]:
    """Puts the states of the global generators back afterwards; worker processes have nothing to put back."""
    if get_worker_info() is not None:
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """What is drawn inside from NumPy's global generator depends on ``seed`` (below 2**32) alone; it goes on after."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
