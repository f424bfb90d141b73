from __future__ import annotations

import pytest
import torch

from tests.support.host import reads_of_values

X = torch.arange(4.0)


@pytest.mark.parametrize(
    "read",
    [
        lambda: X.sum().item(),
        lambda: bool(X.sum() > 0),
        lambda: float(X[0]),
        lambda: X[X > 1],
        lambda: X.tolist(),
        lambda: X.cpu(),
        lambda: X.numpy(),
        lambda: torch.nonzero(X),
        lambda: torch.where(X > 1),
    ],
)
def test_reads_are_found(read, monkeypatch):
    with reads_of_values(monkeypatch) as found:
        read()
    assert found


def test_what_stays_on_the_device_is_no_read(monkeypatch):
    with reads_of_values(monkeypatch) as found:
        torch.where(X > 1, X, 0).sum().clamp_min(1).sqrt()
        X.masked_fill(X > 1, 0)[:2].float().max()
    assert found == []


def test_step_counters_of_optimizers_are_no_reads(monkeypatch):
    parameter = torch.nn.Parameter(X.clone())
    optimizer = torch.optim.Adam([parameter])
    with reads_of_values(monkeypatch) as found:
        parameter.sum().backward()
        optimizer.step()
    assert found == []
