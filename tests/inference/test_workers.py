from __future__ import annotations

import os
import signal

import pytest

from nnssl.inference.workers import CaseQueue, WorkerKilled, worker_pool


@pytest.mark.parametrize("processes", [0, 2])
def test_results_come_in_the_order_of_the_cases(processes):
    with worker_pool(processes) as pool:
        queue = CaseQueue(pool, "a test", "nothing")
        for case, base in (("a", "5"), ("b", "no number"), ("c", "7")):
            queue.submit(case, int, base)
        assert (queue.first, queue.take()) == ("a", 5)
        with pytest.raises(ValueError, match="no number"):
            queue.take()
        assert (queue.first, queue.take(), len(queue)) == ("c", 7, 0)


def test_a_killed_worker_is_told_where_further_work_is_submitted():
    with worker_pool(1) as pool:
        queue = CaseQueue(pool, "a test", "buy memory")
        queue.submit("a", _kill_this_process)
        pool.submit(os.getpid).exception()  # which waits until the pool has noticed
        with pytest.raises(WorkerKilled, match="killed during a test") as caught:
            queue.submit("b", os.getpid)
        assert (caught.value.where, caught.value.fix) == ("one of the cases a", "buy memory")
        with pytest.raises(WorkerKilled, match="one of the cases a"):
            queue.take()
        with pytest.raises(WorkerKilled, match="one of the cases b"):
            queue.submit("b", os.getpid)


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
