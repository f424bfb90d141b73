from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nnssl.trainers.registry import registered_trainers
from tests.support.tiny import Tiny


@pytest.fixture(autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., Tiny]:
    """Makes data sets with one labeled patch per step, or as many as the trainer under test needs."""
    trainer = registered_trainers()[request.node.callspec.params["name"]]
    return lambda **options: Tiny(**{"labeled_batch": trainer.min_labeled_patches, "light": True} | options).write(
        tmp_path / "data", monkeypatch
    )
