from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl.errors import UserError
from nnssl.inference.checkpoint import read_checkpoint, read_model_checkpoint


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (_write, (str(self.target),))


def _write(target: str) -> str:
    Path(target).write_text("code was run")
    return target


def test_numbers_texts_containers_and_tensors_come_back(tmp_path):
    content = {
        "weights": {"a": torch.arange(6.0).reshape(2, 3)},
        "log": [np.float64(0.25), np.float32(0.5), np.int64(3), np.bool_(True), np.arange(4, dtype=np.uint32)],
        "plain": {"none": None, "tuple": (0, 1), "device": torch.device("cpu"), "text": "abc"},
    }
    torch.save(content, tmp_path / "c.pth")
    found = read_checkpoint(tmp_path / "c.pth")
    assert torch.equal(found["weights"]["a"], content["weights"]["a"])
    assert found["log"][:4] == content["log"][:4]
    assert found["log"][4].tolist() == [0, 1, 2, 3]
    assert found["plain"] == content["plain"]


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_pickled_by_numpy_1_and_2_are_read(tmp_path, module):
    torch.save({"number": np.float64(0.75)}, tmp_path / "here.pth")
    old = np.float64(0).__reduce__()[0].__module__.encode()
    with zipfile.ZipFile(tmp_path / "here.pth") as source, zipfile.ZipFile(tmp_path / "there.pth", "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content.replace(old, module.encode()) if name.endswith("data.pkl") else content)
    assert read_checkpoint(tmp_path / "there.pth")["number"] == 0.75


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    torch.save({"network_weights": {}, "evil": Payload(tmp_path / "trace")}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="run code") as caught:
        read_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "trace").exists()
    assert "_write" in str(caught.value.found)
    assert "--trust_checkpoint" in str(caught.value)


def test_code_in_a_checkpoint_is_run_on_request(tmp_path):
    torch.save({"evil": Payload(tmp_path / "trace")}, tmp_path / "c.pth")
    read_checkpoint(tmp_path / "c.pth", trust=True)
    assert (tmp_path / "trace").exists()


def test_code_in_a_bare_pickle_is_not_run(tmp_path):
    (tmp_path / "c.pth").write_bytes(pickle.dumps(Payload(tmp_path / "trace")))
    with pytest.raises(UserError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "c.pth")
    assert not (tmp_path / "trace").exists()


def _cut_off(path: Path) -> None:
    torch.save({"network_weights": {"a": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:2000])


def _other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no checkpoint")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "not found"),
        (lambda path: path.write_bytes(b""), "not a checkpoint"),
        (lambda path: path.write_text("weights"), "not a checkpoint"),
        (_cut_off, "cut off"),
        (_other_zip, "damaged"),
        (lambda path: torch.save([1, 2], path), "network_weights, init_args, trainer_name"),
        (lambda path: torch.save({"network_weights": {}, "init_args": {}, "trainer_name": "A"}, path), "configuration"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, make, message):
    make(tmp_path / "c.pth")
    with pytest.raises(UserError, match=message) as caught:
        read_model_checkpoint(tmp_path / "c.pth")
    assert caught.value.where == tmp_path / "c.pth"


def test_trainers_read_back_what_they_write_themselves(tmp_path):
    content = {
        "network_weights": {},
        "init_args": {"configuration": "2d"},
        "trainer_name": "A",
        "semi_supervised": {"random_states": {"numpy": ("MT19937", torch.zeros(4), 1, 0, 0.0)}},
    }
    torch.save(content, tmp_path / "c.pth")
    assert read_model_checkpoint(tmp_path / "c.pth")["semi_supervised"]["random_states"]["numpy"][0] == "MT19937"
