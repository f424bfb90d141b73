from __future__ import annotations

import os
from pathlib import Path

import pytest

# as the commands do, and before torch is loaded: spinning threads stall each other where processes share cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the soak tests out unless they are asked for."""
    if "soak" not in config.getoption("markexpr"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("soak")])
        items[:] = [item for item in items if not item.get_closest_marker("soak")]


@pytest.fixture(scope="session", autouse=True)
def _engine_without_threads() -> None:
    """A backward pass before any on fake tensors.

    With these torch seems to have a CUDA device, its engine would start a thread for it, and no test could fork.
    """
    import torch

    torch.ones((), requires_grad=True).backward()


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder with nnU-Net's three folders in it; the environment variables point there."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the developers' real data sets; tests that use it are marked ``data``."""
    folder = Path(os.environ.get("NNSSL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found in {folder} (set NNSSL_TEST_DATA)")
    return folder
