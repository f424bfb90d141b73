"""Each case runs in a process of its own, with a folder of made-up installations in front of the search path."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import nnssl
from nnssl.guard import MESSAGE

ROOT = Path(nnssl.__file__).parent.parent
OURS = "[console_scripts]\nnnssl_predict = nnssl.cli:predict\nnnssl_train = nnssl.cli:train\n"
THEIRS = "[console_scripts]\nnnssl_train = nnssl.run.run_training:run_training_entry\n"


def add_metadata(folder: Path, name: str, entry_points: str | None, file: str = "METADATA") -> None:
    metadata = folder / name
    metadata.mkdir(parents=True)
    (metadata / file).write_text("Metadata-Version: 2.1\nName: nnssl\nVersion: 0.1\nSummary: anything\n")
    if entry_points is not None:
        (metadata / "entry_points.txt").write_text(entry_points)


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )


def add_package(folder: Path) -> None:
    """A copy of our package in which files can be placed: its modules are those of the checkout."""
    package = folder / "nnssl"
    package.mkdir()
    for source in (ROOT / "nnssl").iterdir():
        if source.name != "__pycache__":
            (package / source.name).symlink_to(source)


@pytest.mark.parametrize(
    ("name", "entry_points", "file"),
    [
        ("nnssl-0.1.dist-info", THEIRS, "METADATA"),
        ("nnssl-0.1.dist-info", None, "METADATA"),
        ("nnSSL.egg-info", THEIRS, "PKG-INFO"),
    ],
)
def test_another_distribution_is_refused(tmp_path, name, entry_points, file):
    add_metadata(tmp_path, name, entry_points, file)
    result = run_python(tmp_path, "-c", "import nnssl")
    assert result.returncode == 1
    assert f"ImportError: {MESSAGE}" in result.stderr


@pytest.mark.parametrize("bytecode_only", [False, True])
def test_modules_of_the_other_package_are_refused(tmp_path, bytecode_only):
    add_package(tmp_path)
    (tmp_path / "nnssl" / "architectures").mkdir()
    leftover = "__pycache__" if bytecode_only else "registry.py"
    (tmp_path / "nnssl" / "architectures" / leftover).touch()
    result = run_python(tmp_path, "-c", "import nnssl")
    assert result.returncode == (0 if bytecode_only else 1)
    assert (MESSAGE in result.stderr) is not bytecode_only


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "nnssl", "train", "--help"],
        ["nnssl_train", "--help"],
    ],
)
def test_commands_say_one_sentence_and_exit_2(tmp_path, arguments):
    add_metadata(tmp_path, "nnssl-0.1.dist-info", THEIRS)
    (tmp_path / "nnssl_train").write_text("import sys\nfrom nnssl.cli import train\nsys.exit(train())\n")
    result = run_python(tmp_path, *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", MESSAGE + "\n")


def test_commands_refuse_even_if_the_other_package_replaced_our_init(tmp_path):
    add_package(tmp_path)
    (tmp_path / "nnssl" / "__init__.py").unlink()
    (tmp_path / "nnssl" / "__init__.py").touch()
    (tmp_path / "nnssl" / "architectures").mkdir()
    (tmp_path / "nnssl" / "architectures" / "__init__.py").touch()
    (tmp_path / "nnssl_predict").write_text("import sys\nfrom nnssl.cli import predict\nsys.exit(predict())\n")
    result = run_python(tmp_path, "nnssl_predict", "--help")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", MESSAGE + "\n")


def test_two_records_of_our_own_package_are_accepted(tmp_path):
    """An installed copy beside an editable one, and a checkout after a build."""
    add_metadata(tmp_path, "nnssl-9.9.dist-info", OURS)
    add_metadata(tmp_path, "nnssl.egg-info", OURS, "PKG-INFO")
    assert run_python(tmp_path, "-c", "import nnssl").returncode == 0


def test_a_checkout_that_is_not_installed_is_accepted(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = "import nnssl, sys; print(nnssl.__version__)"
    result = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout.strip()) == (0, nnssl.__version__)


def test_remains_of_an_installation_and_similar_names_are_accepted(tmp_path):
    (tmp_path / "nnssl-0.1.dist-info").mkdir()
    add_metadata(tmp_path, "nnssl_extras-1.0.dist-info", THEIRS)
    add_metadata(tmp_path, "mynnssl-1.0.dist-info", None)
    assert run_python(tmp_path, "-c", "import nnssl").returncode == 0
