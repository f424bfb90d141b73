from __future__ import annotations

from multiprocessing.pool import ThreadPool
from pathlib import Path

import nnunetv2.utilities.utils
import pytest

from tests.preprocessing.raw_data import set_folders


@pytest.fixture
def raw_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return set_folders(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def quick_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net forks twelve processes to list a folder; with threads the many plans of these tests are quick."""
    monkeypatch.setattr(nnunetv2.utilities.utils, "Pool", ThreadPool)
