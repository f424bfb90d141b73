from __future__ import annotations

import os
import random
import signal

import numpy as np
import pytest
import torch

from nnssl.dataloading.streams import BatchStream, SeededBatches
from nnssl.errors import UserError


class Draws:
    """A source that returns what the three global generators give."""

    def generate_train_batch(self, announce):
        return {"data": torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()])}


class Fails:
    def generate_train_batch(self, announce):
        raise RuntimeError("preprocessed case patient_7 cannot be read")


class Dies:
    """Ends its process with the fifth batch that it makes of a stream with seed 0."""

    def get_indices(self):
        return [f"case_{np.random.randint(100)}", "another"]

    def generate_train_batch(self, announce):
        case = self.get_indices()[0]
        if case == "case_76":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"data": torch.zeros(1)}


def _take(stream: BatchStream, n: int) -> torch.Tensor:
    batches = torch.stack([next(stream)["data"] for _ in range(n)])
    stream.close()
    return batches


def test_a_batch_depends_on_seed_stream_and_index_only():
    batches = SeededBatches(Draws(), "labeled", 3)
    first = batches[5]["data"]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert torch.equal(batches[5]["data"], first)
    assert not torch.equal(batches[6]["data"], first)
    assert not torch.equal(SeededBatches(Draws(), "unlabeled", 3)[5]["data"], first)
    assert not torch.equal(SeededBatches(Draws(), "labeled", 4)[5]["data"], first)


def test_drawing_in_this_process_leaves_its_generators_alone():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = random.random(), np.random.rand(), torch.rand(1)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    _take(BatchStream(SeededBatches(Draws(), "labeled", 0), 0, num_workers=0), 2)
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches_in_order(workers):
    alone = _take(BatchStream(SeededBatches(Draws(), "labeled", 0), 0, num_workers=0), 6)
    assert torch.equal(_take(BatchStream(SeededBatches(Draws(), "labeled", 0), 0, num_workers=workers), 6), alone)


def test_a_stream_continues_where_another_stopped():
    batches = SeededBatches(Draws(), "labeled", 0)
    whole = _take(BatchStream(batches, 0, num_workers=0), 6)
    assert torch.equal(_take(BatchStream(batches, 4, num_workers=1), 2), whole[4:])


def test_an_error_in_a_worker_is_told_by_its_last_line():
    stream = BatchStream(SeededBatches(Fails(), "labeled", 0), 0, num_workers=1)
    with pytest.raises(UserError, match="labeled stream stopped") as caught:
        next(stream)
    assert "patient_7" in caught.value.found


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dead_worker_ends_the_stream_with_its_cases_and_advice(workers):
    batches = SeededBatches(Dies(), "unlabeled", 0)
    drawn = [batches.cases(index) for index in range(6)]
    at = drawn.index(["case_76", "another"])
    stream = BatchStream(batches, 0, num_workers=workers)
    with pytest.raises(UserError, match="worker process of the unlabeled stream died") as caught:
        _take(stream, 6)
    stream.close()
    assert "case_76, another" in str(caught.value)
    others = [cases[0] for number, cases in enumerate(drawn) if number != at]
    assert not [case for case in others if case in str(caught.value)]
    assert "nnUNet_n_proc_DA=1" in str(caught.value)
