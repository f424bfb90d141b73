from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnssl.dataloading.mixed_pairs import MixedPairsLoader
from nnssl.errors import UserError
from nnssl.networks.unwrap import unwrap
from tests.support.tiny import Tiny

BUDGET = {"num_epochs": 3, "num_iterations_per_epoch": 2, "labeled_batch_size": 2, "mirror_axes": ()}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    yield Tiny(labeled_batch=2).write(tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(False)


def test_round_0_is_supervised_with_the_switch(tiny):
    trainer = tiny.trainer("SwitchedSelfTraining", num_epochs=2, num_iterations_per_epoch=3, labeled_batch_size=2)
    assert trainer.phase_starts == (2,)
    alone = tiny.trainer("Supervised", atlas_augmentation="regional_switch", labeled_batch_size=2)
    batches = [next(one.get_dataloaders()[0]) for one in (trainer, alone)]
    assert torch.equal(batches[0]["data"], batches[1]["data"])
    assert batches[0]["unlabeled"] is None


def test_later_rounds_train_on_pairs_of_labeled_and_pseudo_labeled_cases(tiny, monkeypatch):
    seen = []
    draw = MixedPairsLoader.draw_cases

    def noted(self):
        seen.append(draw(self))
        return seen[-1]

    monkeypatch.setattr(MixedPairsLoader, "draw_cases", noted)
    trainer = tiny.trainer("SwitchedSelfTraining", **BUDGET)
    trainer.run_training()
    assert trainer.iteration == 6
    assert len(seen) == 4  # rounds of two and four steps
    assert all(first.startswith("labeled") and second.startswith("unlabeled") for first, second in seen)
    assert trainer.pseudo_labels(0).folder.is_dir()


def test_without_mixing_pseudo_labeled_patches_are_a_stream_of_their_own(tiny, monkeypatch):
    steps = []
    trainer = tiny.trainer("SwitchedSelfTraining", **BUDGET, mixing=False)
    make = trainer.make_step
    monkeypatch.setattr(trainer, "make_step", lambda batch: steps.append(make(batch)) or steps[-1])
    trainer.run_training()
    assert [len(step.unlabeled) for step in steps] == [0, 0, 2, 2, 2, 2]


def test_a_stopped_training_goes_on_exactly(tiny):
    whole = tiny.trainer("SwitchedSelfTraining", **BUDGET)
    whole.run_training()
    expected = {key: value.clone() for key, value in unwrap(whole.network).state_dict().items()}
    trainer = tiny.trainer("SwitchedSelfTraining", **BUDGET)
    folder = Path(trainer.output_folder)
    after = trainer.after_step

    def stop_in_round_1(step):
        if trainer.iteration == 4:
            (folder / "stop").touch()
        after(step)

    trainer.after_step = stop_in_round_1
    with pytest.raises(SystemExit):
        trainer.run_training()
    again = tiny.bare_trainer("SwitchedSelfTraining")
    again.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert again.iteration == 4
    again.run_training()
    found = unwrap(again.network).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_one_labeled_case_is_refused(tmp_path, monkeypatch):
    trainer = Tiny(labeled=1, labeled_batch=2).write(tmp_path, monkeypatch).trainer("SwitchedSelfTraining", **BUDGET)
    with pytest.raises(UserError, match="at least 2 labeled cases"):
        trainer.run_training()


def test_one_weight_for_voxels_of_both_kinds(tmp_path, monkeypatch):
    tiny = Tiny(labeled=2, labeled_batch=2).write(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"(?s)pseudo_weight.*1 while mixing"):
        tiny.trainer("SwitchedSelfTraining", pseudo_weight=0.5, **BUDGET).run_training()


def test_a_single_labeled_patch_is_refused(tmp_path, monkeypatch):
    """It would be the pseudo-labeled one of a pair."""
    tiny = Tiny(labeled=2, labeled_batch=1).write(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="at least 2 labeled patches per step"):
        tiny.trainer("SwitchedSelfTraining", **BUDGET | {"labeled_batch_size": 1}).run_training()
