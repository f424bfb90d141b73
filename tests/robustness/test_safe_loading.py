"""Files of others run no code: each of these would make a file if it were loaded as its kind usually is."""

from __future__ import annotations

import ast
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import nnssl
from nnssl.dataloading.properties import read_properties, vet_properties
from nnssl.errors import UserError
from nnssl.planners.plans_file import refuse_foreign_code
from tests.inference.model_folders import write_model
from tests.robustness.place import MODEL, NAME, PLANS, PREDICT, TRAIN, TRAIN_NEXT
from tests.support.tiny import Tiny

PACKAGE = Path(nnssl.__file__).parent


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


def _calls(name: str) -> list[tuple[str, ast.Call]]:
    """Calls of a function or method of this name in the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == name:
                found.append((str(path.relative_to(PACKAGE)), node))
    return found


def test_there_is_one_place_that_reads_checkpoints_and_it_runs_code_on_demand_only():
    calls = _calls("torch.load")
    assert {file for file, _ in calls} == {"inference/checkpoint.py"}
    unsafe = [call for _, call in calls if "weights_only=True" not in ast.unparse(call)]
    assert len(unsafe) == 1, "the one behind --trust_checkpoint"


@pytest.mark.parametrize("name", ["pickle.load", "pickle.loads", "load_pickle", "eval", "exec", "os.system",
                                  "yaml.load", "shutil.unpack_archive", "zipfile.ZipFile.extractall"])  # fmt: skip
def test_nothing_in_the_package_calls(name):
    assert not _calls(name)


def test_arrays_are_read_without_pickle():
    assert all("allow_pickle" not in ast.unparse(call) for _, call in _calls("np.load"))


PRETRAINED = f"{{root}}/nnUNet_results/{NAME}/{MODEL}/fold_0/checkpoint_final.pth"


@pytest.mark.parametrize(
    "command",
    [
        TRAIN + " --val",
        TRAIN + " --c",
        PREDICT,
        "export -d 801 -o {root}/exported",
        f"{TRAIN_NEXT} -pretrained_weights {PRETRAINED}",
    ],
)
def test_a_malicious_checkpoint(place, capsys, command):
    content = torch.load(place.checkpoint, weights_only=False)
    torch.save(content | {"logging": Touch(place.root / "owned")}, place.checkpoint)
    assert place.run(command) == 2
    message = capsys.readouterr().err
    assert "wants to run code" in message
    assert "checkpoint_final.pth" in message
    assert "Traceback" not in message
    assert not (place.root / "owned").exists()
    torch.load(place.checkpoint, weights_only=False)
    assert (place.root / "owned").exists(), "the file must be malicious"


@pytest.mark.parametrize("command", [TRAIN_NEXT, TRAIN + " --val"])
def test_malicious_properties_of_a_case(place, capsys, command):
    """l0 is validated on in fold 0 and trained on in fold 1."""
    file = place.cases / "l0.pkl"
    properties = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(properties | {"spacing": Touch(place.root / "owned")}))
    # its size is in the manifest, which whoever sends a folder can write, too
    manifest = place.base / "manifests" / f"{PLANS}_3d_fullres.json"
    content = json.loads(manifest.read_text())
    content["cases"]["l0"]["files"]["l0.pkl"] = file.stat().st_size
    manifest.write_text(json.dumps(content))
    assert place.run(command) == 2
    message = capsys.readouterr().err
    assert "wants to run code" in message
    assert "l0.pkl" in message
    assert not (place.root / "owned").exists()
    pickle.loads(file.read_bytes())
    assert (place.root / "owned").exists(), "the file must be malicious"


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_properties_are_what_nnunet_loads(tmp_path, protocol):
    content = {
        "spacing": [1.0, np.float64(2), np.float32(3)],
        "sitk_stuff": OrderedDict(origin=(0.0, 1.0)),
        "class_locations": {1: np.arange(12).reshape(3, 4), (1, 2): [], -1: np.zeros((0, 4), np.int16)},
        "shape": (np.int64(3), 4),
        "slices": (slice(0, 3), {1, 2}, b"bytes", True, None),
    }
    (tmp_path / "case.pkl").write_bytes(pickle.dumps(content, protocol))
    vet_properties(tmp_path, ["case", "missing"])
    found = read_properties(tmp_path / "case.pkl")
    assert repr(found) == repr(content)


@pytest.mark.parametrize("data", [b"", b"no pickle", pickle.dumps(np.zeros(99))[:-40]])
def test_damaged_properties_are_named(tmp_path, data):
    (tmp_path / "case.pkl").write_bytes(data)
    with pytest.raises(UserError, match=r"damaged[\s\S]*case\.pkl"):
        vet_properties(tmp_path, ["case"])


@pytest.mark.parametrize("code", [os.system, eval, getattr, np.load, torch.load, Touch, pickle.loads])
def test_no_function_is_loaded_with_properties(tmp_path, code):
    (tmp_path / "case.pkl").write_bytes(pickle.dumps(code))
    with pytest.raises(UserError, match="wants to run code"):
        read_properties(tmp_path / "case.pkl")


def _plans_with(**names: str) -> dict:
    plans = Tiny().plans()
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    architecture["network_class_name"] = names.pop("network", architecture["network_class_name"])
    architecture["arch_kwargs"].update(names)
    return plans


@pytest.mark.parametrize(
    "name",
    [
        "subprocess.run",
        "torch.hub.load",
        "torch.nn.modules.conv.torch.hub.load",
        "torch.nn.functional.relu",
        "torch.nn.NoSuchLayer",
        "evil_module.Network",
        "torch.nnevil.Network",
    ],
)
@pytest.mark.parametrize("entry", ["network", "nonlin"])
def test_plans_name_classes_of_known_packages_only(tmp_path, name, entry):
    with pytest.raises(UserError) as refusal:
        refuse_foreign_code(_plans_with(**{entry: name}), "3d_fullres", tmp_path / "plans.json")
    assert name in str(refusal.value)
    assert str(tmp_path / "plans.json") in str(refusal.value)


def test_plans_of_nnunet_and_of_trusted_packages(tmp_path, monkeypatch):
    refuse_foreign_code(_plans_with(), "3d_fullres", tmp_path)
    moved = "dynamic_network_architectures.somewhere.else.ResidualEncoderUNet"
    refuse_foreign_code(_plans_with(network=moved), "3d_fullres", tmp_path)
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("from torch import nn\n\n\nclass Network(nn.Module):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="NNSSL_TRUSTED_PACKAGES=mine"):
        refuse_foreign_code(_plans_with(network="mine.Network"), "3d_fullres", tmp_path)
    monkeypatch.setenv("NNSSL_TRUSTED_PACKAGES", "other, mine")
    refuse_foreign_code(_plans_with(network="mine.Network"), "3d_fullres", tmp_path)


@pytest.mark.parametrize("command", [TRAIN_NEXT, PREDICT, "export -d 801 -o {root}/exported"])
def test_malicious_plans(place, capsys, command):
    """A module that makes a file when it is imported lies on the search path."""
    folder = place.root / "path"
    folder.mkdir()
    (folder / "evil_module.py").write_text(f"open({str(place.root / 'owned')!r}, 'w')\n")
    place.monkeypatch.syspath_prepend(str(folder))
    for file in (place.base / f"{PLANS}.json", place.model / "plans.json"):
        content = json.loads(file.read_text())
        content["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "evil_module.Network"
        file.write_text(json.dumps(content))
    assert place.run(command) == 2
    message = capsys.readouterr().err
    assert "not trusted" in message
    assert "evil_module.Network" in message
    assert not (place.root / "owned").exists()


def test_exported_archives_name_nothing_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    write_model(tmp_path / "results", trainer="Supervised")
    from nnssl.cli import run

    assert run("export", ["-d", "901", "-o", str(tmp_path / "model.zip"), "--zip"]) == 0
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        names = archive.namelist()
    assert names
    assert not [name for name in names if name.startswith(("/", "\\")) or ".." in Path(name).parts or ":" in name]


def test_archives_of_others_stay_in_the_folder_of_models(tmp_path, monkeypatch):
    """nnssl unpacks nothing; nnU-Net's import, for which it writes archives, must not follow names out of it."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    from nnunetv2.model_sharing import model_import

    monkeypatch.setattr(model_import, "nnUNet_results", str(tmp_path / "results"), raising=False)
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for name in ("../up", "a/../../../up", f"{tmp_path}/absolute", "Dataset001_X/plans.json"):
            archive.writestr(name, "x")
    model_import.install_model_from_zip_file(str(tmp_path / "evil.zip"))
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "evil.zip"]
    assert written
    assert all((tmp_path / "results") in path.parents for path in written)
