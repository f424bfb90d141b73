"""Metadata, pinned versions, commands and documents agree with each other."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import nnssl
from nnssl.cli import COMMANDS
from tests.conftest import REPOSITORY

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def test_version_stands_in_one_place_and_the_documents_agree(project):
    assert project["dynamic"] == ["version"]
    assert "version" not in project
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert f"\nversion: {nnssl.__version__}\n" in citation
    assert f"\n## {nnssl.__version__} " in (REPOSITORY / "CHANGELOG.md").read_text()


def test_every_command_has_a_script_a_module_and_a_function(project):
    assert project["scripts"] == {f"nnssl_{name}": f"nnssl.cli:{name}" for name in COMMANDS}
    # what commands share begins with an underscore
    modules = {path.stem for path in (REPOSITORY / "nnssl" / "cli").glob("*.py")}
    assert {name for name in modules if not name.startswith("_")} == set(COMMANDS)
    # read, not imported: nnssl.cli.train is the function until a test imports the module of that name
    source = ast.parse((REPOSITORY / "nnssl" / "cli" / "__init__.py").read_text())
    assert set(COMMANDS) <= {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
    for name in COMMANDS:
        assert callable(importlib.import_module(f"nnssl.cli.{name}").main)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_instant_because_nothing_heavy_is_imported(command):
    code = (
        "import sys, runpy; sys.argv = ['nnssl', sys.argv[1], '--help']\n"
        "try:\n    runpy.run_module('nnssl', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'nnunetv2', 'numpy', 'scipy', 'pandas', 'SimpleITK', 'matplotlib'} & set(sys.modules)\n"
        "    sys.exit(f'exit {end.code}, imported {heavy}' if end.code or heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: nnssl_{command} ")


def test_unknown_commands_and_the_list_of_commands():
    result = subprocess.run([sys.executable, "-m", "nnssl", "segment"], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "unknown command 'segment'" in result.stderr
    listed = subprocess.run([sys.executable, "-m", "nnssl"], capture_output=True, text=True, timeout=60)
    assert listed.returncode == 0
    assert set(COMMANDS) <= set(listed.stdout.split())


def test_pinned_versions_satisfy_the_declared_ranges(project, pins):
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in map(Requirement, declared):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
    assert "torchvision" in pins  # belongs to one version of torch, and nnU-Net's imports fail with another
    assert "nnssl" not in pins


def test_the_package_is_typed():
    assert (REPOSITORY / "nnssl" / "py.typed").is_file()


def test_files_that_are_not_python_are_installed():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = REPOSITORY / "nnssl"
    installed = {file for pattern in settings["nnssl"] for file in package.glob(pattern)}
    others = {f for f in package.rglob("*") if f.is_file() and f.suffix != ".py" and "__pycache__" not in f.parts}
    assert others == installed


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_documents_name_only_commands_that_exist(document):
    named = set(re.findall(r"\bnnssl_([a-z_]+)", (REPOSITORY / document).read_text()))
    assert named <= set(COMMANDS)


def test_the_readme_lists_every_trainer():
    from nnssl.trainers.registry import trainer_names

    rows = re.findall(r"^\| `(\w+)` \|", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == trainer_names()


def test_the_readme_tells_the_memory_that_the_classes_do():
    from nnssl.trainers.registry import get_trainer, trainer_names

    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+) \| [^|]*\|$", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
    told = {name: float(factor) for name, factor in rows}
    assert told == pytest.approx({name: get_trainer(name).memory_factor for name in trainer_names()}, abs=0.051)
