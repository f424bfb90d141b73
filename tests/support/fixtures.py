"""Fixtures of tests that train the tiny data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.support.tiny import Tiny


@pytest.fixture
def build(tmp_path, monkeypatch) -> Iterator[Callable[..., tuple[Tiny, Any]]]:
    """Makes a trainer by name, with options of the tiny data set and hyper-parameters, and its data set, once."""

    def build(name: str, options: dict[str, Any] | None = None, **overrides: Any) -> tuple[Tiny, Any]:
        data = Tiny(**options or {})
        if (tmp_path / "data").exists():
            data.folder = tmp_path / "data"
        else:
            data.write(tmp_path / "data", monkeypatch)
        return data, data.trainer(name, **overrides)

    threads = torch.get_num_threads()
    yield build
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
