"""Rules about the source code as a whole, held by reading it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nnssl

PACKAGE = Path(nnssl.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# From top to bottom; a module imports from its own row and from rows below.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"benchmark", "report"},
    {"trainers", "inference", "evaluation", "ext_trainer"},
    {"dataloading", "preprocessing", "planners"},
    {"networks", "losses", "augmentation", "dataset", "pictures"},
    {"utils"},
    {"errors", "guard", "_version"},
)
# These know tensors and arrays only, so that they can be used and tested on their own.
LEAVES = {"networks", "losses", "augmentation"}
HEAVY = {"torch", "nnunetv2", "numpy", "scipy", "pandas", "matplotlib", "SimpleITK", "batchgenerators", "blosc2"}
LIGHT_PARTS = {"nnssl.errors", "nnssl.guard", "nnssl.cli", "nnssl.cli._models", "nnssl._version"}

FORBIDDEN_COMMANDS = (
    "nnssl_extract_fingerprint",
    "nnssl_plan_experiment",
    "nnssl_preprocess",
    "nnssl_convert_openmind",
    "nnssl_train_wandb",
)
FORBIDDEN_VARIABLES = ("nnssl_raw", "nnssl_preprocessed", "nnssl_results", "nnssl_pretrained_models")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST, package: str) -> Iterator[str]:
    """Dotted names imported anywhere in the tree; ``from a import b`` gives ``a.b``, for b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part_of(dotted: str) -> str | None:
    """``losses`` for ``nnssl.losses.dice``; None for other packages and for names of nnssl itself."""
    pieces = dotted.split(".")
    known = set().union(*LAYERS)
    return pieces[1] if pieces[0] == "nnssl" and len(pieces) > 1 and pieces[1] in known else None


def height(part: str) -> int:
    return -next(row for row, parts in enumerate(LAYERS) if part in parts)


def package_of(path: Path) -> str:
    name = module_name(path)
    return name if path.name == "__init__.py" else name.rpartition(".")[0]


def upward_imports(path: Path, source: str) -> list[str]:
    own = part_of(module_name(path))
    wrong = []
    for name in imported_names(ast.parse(source), package_of(path)):
        other = part_of(name)
        if own is None or other is None or other == own:
            continue
        if height(other) > height(own) or (own in LEAVES and other in LAYERS[5]):
            wrong.append(f"{module_name(path)} imports {name}")
    return wrong


def test_every_part_of_the_package_has_a_layer():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in MODULES} - {"__init__"}
    assert parts <= set().union(*LAYERS)


def test_imports_point_downward():
    assert [line for path in MODULES for line in upward_imports(path, path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    "source",
    [
        "from nnssl.trainers.base import X",
        "import nnssl.cli",
        "from nnssl import report",
        "def f():\n    from ..inference import run",
        "from nnssl.losses import dice",
    ],
)
def test_upward_imports_are_found(source):
    assert upward_imports(PACKAGE / "networks" / "example.py", source)


def test_downward_imports_are_allowed():
    source = "from nnssl.errors import UserError\nfrom nnssl.networks.other import y\nimport torch"
    assert upward_imports(PACKAGE / "networks" / "example.py", source) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli").glob("*.py")), ids=lambda path: path.stem)
def test_commands_import_nothing_heavy_before_they_have_read_their_flags(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    at_import = [
        node
        for node in tree.body
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]
    names = list(imported_names(ast.Module(at_import, []), "nnssl.cli"))
    own = [name for name in names if name.startswith("nnssl") and name.rpartition(".")[0] not in LIGHT_PARTS]
    assert [name for name in names if name.split(".")[0] in HEAVY] + own == []


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_no_name_of_the_other_nnssl_is_used(path):
    words = set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    assert words.isdisjoint(FORBIDDEN_COMMANDS + FORBIDDEN_VARIABLES)


@pytest.mark.parametrize(
    "path",
    [path for path in MODULES if part_of(module_name(path)) in ("trainers", "inference", "networks", "utils")],
    ids=module_name,
)
def test_no_key_of_a_checkpoint_begins_with_the_package_name(path):
    """Checkpoints of the other nnssl are told by their keys, which begin with ``nnssl_``."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    keys = [key for node in ast.walk(tree) if isinstance(node, ast.Dict) for key in node.keys]
    keys += [node.slice for node in ast.walk(tree) if isinstance(node, ast.Subscript)]
    texts = [key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)]
    assert [text for text in texts if text.startswith("nnssl_")] == []


def test_files_stay_small():
    lines = {module_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > 420} == {}
