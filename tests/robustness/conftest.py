from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.robustness.place import Place, make_place


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a place that is made once and never changed."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        root = make_place(tmp_path_factory.mktemp("original") / "place", patch).root
    torch.set_num_threads(threads)
    return root


@pytest.fixture
def place(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A copy of it that a test may damage."""
    threads = torch.get_num_threads()
    shutil.copytree(original, tmp_path / "place")
    yield Place(tmp_path / "place", monkeypatch)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def shared_place(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A copy that the tests of a module share."""
    threads = torch.get_num_threads()
    root = tmp_path_factory.mktemp("shared") / "place"
    shutil.copytree(original, root)
    with pytest.MonkeyPatch.context() as patch:
        yield Place(root, patch)
    torch.set_num_threads(threads)
