from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnssl.ext_trainer import shim_folder
from nnssl.inference.models import find_model
from nnssl.inference.predictor import Predictor
from nnssl.trainers.registry import get_trainer, registered_trainers
from tests.support.tiny import Tiny, save_model


def search(name: str) -> type | None:
    """nnU-Net's search in one folder of ``nnUNet_extTrainer``, with the arguments that it uses there."""
    folder = str(shim_folder())
    return recursive_find_python_class(folder, name, None, base_folder=folder, cleanup_imports_from_base_folder=True)


@pytest.mark.parametrize("name", ["Supervised", "MeanTeacher"])
def test_trainers_are_found(name):
    found = search(name)
    assert found is get_trainer(name)
    assert found.__name__ == name
    assert issubclass(found, nnUNetTrainer)


def test_every_registered_trainer_is_found():
    assert {name: search(name) for name in registered_trainers()} == registered_trainers()


@pytest.mark.parametrize("name", ["NoSuchTrainer", "nnUNetTrainer", "registered_trainers_", "__path__"])
def test_other_names_are_left_to_nnunet(name):
    assert search(name) is None


def test_the_search_leaves_no_trace():
    search("MeanTeacher")
    assert "nnssl_trainers" not in sys.modules
    assert str(shim_folder()) not in sys.path


@pytest.mark.slow
def test_nnunets_whole_search():
    command = (
        "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find;"
        "print(find('MeanTeacher').__module__)"
    )
    environment = os.environ | {"nnUNet_extTrainer": str(shim_folder())}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].startswith("nnssl.trainers.")


STOCK_PREDICTION = """
import sys, torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
predictor.initialize_from_trained_model_folder(sys.argv[1], ("all",), "checkpoint_final.pth")
image = torch.randn(1, 16, 20, 16, generator=torch.Generator().manual_seed(1))
torch.save(predictor.predict_logits_from_preprocessed_data(image), sys.argv[2])
"""


@pytest.mark.slow
def test_stock_predicts_with_a_checkpoint_of_ours(tmp_path, monkeypatch):
    tiny = Tiny().write(tmp_path, monkeypatch)
    trainer = tiny.trainer("MeanTeacher")
    trainer.train_step(tiny.batch())
    folder = save_model(trainer)
    found = tmp_path / "logits.pt"
    environment = os.environ | {"nnUNet_extTrainer": str(shim_folder())}
    subprocess.run([sys.executable, "-c", STOCK_PREDICTION, str(folder), str(found)], env=environment, check=True)
    ours = Predictor(device=torch.device("cpu"), precision="fp32", memory_format="contiguous", allow_tqdm=False)
    ours.initialize_from_model(find_model(tiny.base.name))
    image = torch.randn(1, 16, 20, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.load(found), ours.predict_logits_from_preprocessed_data(image))
