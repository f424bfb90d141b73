"""`SwitchedSupervised` is `Supervised` with the regional switch, and nothing else."""

from __future__ import annotations

import pytest
import torch

from nnssl.errors import UserError
from nnssl.networks.unwrap import unwrap
from tests.support.tiny import Tiny


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    yield lambda **options: Tiny(**{"labeled_batch": 2} | options).write(tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(False)


def weights_after_training(tiny, name, **overrides):
    trainer = tiny.trainer(name, num_epochs=1, num_iterations_per_epoch=3, **overrides)
    trainer.run_training()
    return trainer.output_folder, unwrap(trainer.network).state_dict()


def test_it_is_supervised_with_the_switch_in_a_folder_of_its_own(tiny):
    data = tiny()
    folder, found = weights_after_training(data, "SwitchedSupervised")
    other, expected = weights_after_training(data, "Supervised", atlas_augmentation="regional_switch")
    assert folder != other
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    _, plain = weights_after_training(data, "Supervised")
    assert not all(torch.equal(found[key], value) for key, value in plain.items())


def test_one_labeled_case_is_refused(tiny):
    with pytest.raises(UserError, match="2 labeled cases"):
        tiny(labeled=1).trainer("SwitchedSupervised").run_training()
