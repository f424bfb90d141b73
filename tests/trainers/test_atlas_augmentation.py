"""The regional switch in the labeled stream of a training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl.cli import run as run_command
from nnssl.dataloading.atlas_pairs import AtlasPairsLoader
from nnssl.errors import UserError
from nnssl.losses.labels import resized_labels
from nnssl.trainers.engine.distributed import Ranks
from nnssl.trainers.engine.requirements import check_requirements
from tests.support.tiny import PLANS, Tiny

SWITCH = {"atlas_augmentation": "regional_switch"}


def labeled_batches(trainer, count: int = 4) -> list[dict]:
    training, validation = trainer.get_dataloaders()
    batches = [next(training) for _ in range(count)]
    training.close()
    validation.close()
    return batches


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["data"], b["data"]) and all(map(torch.equal, a["target"], b["target"]))


@pytest.mark.parametrize("options", [{}, {"dimensions": 2}, {"regions": True}, {"ignore": True}, {"classes": 3}])
def test_targets_of_all_heads_are_those_of_the_switched_labels(build, options):
    _, trainer = build("Supervised", {"labeled": 3, "labeled_batch": 2, **options}, **SWITCH, switch_probability=1.0)
    for batch in labeled_batches(trainer):
        assert len(set(batch["keys"])) == 2
        full, *coarser = batch["target"]
        expected = resized_labels(full, [head.shape[2:] for head in coarser])
        assert coarser
        assert all(map(torch.equal, coarser, expected))


def test_without_the_switch_the_stream_is_nnunets_and_with_it_another(build):
    data, trainer = build("Supervised", {"labeled_batch": 2})
    usual = labeled_batches(trainer)
    assert all(map(same, labeled_batches(data.trainer("Supervised", atlas_augmentation="none")), usual))
    switched = labeled_batches(data.trainer("Supervised", **SWITCH))
    assert not any(map(same, switched, usual))
    assert all(map(same, labeled_batches(data.trainer("Supervised", **SWITCH)), switched))


def test_unlabeled_and_validation_patches_stay_as_they_are(build):
    data, trainer = build("MeanTeacher", {"labeled_batch": 2})
    other = data.trainer("MeanTeacher", **SWITCH)
    streams = [t.get_dataloaders() for t in (trainer, other)]
    assert torch.equal(*(next(training)["unlabeled"] for training, _ in streams))
    assert same(*(next(validation) for _, validation in streams))
    assert isinstance(streams[1][0].labeled._loader.dataset.source, AtlasPairsLoader)
    assert not isinstance(streams[1][1]._loader.dataset.source, AtlasPairsLoader)


def test_ranks_that_share_a_batch_make_the_rows_of_one_process(build):
    data, trainer = build("Supervised", {"labeled": 3, "labeled_batch": 4}, **SWITCH)
    whole = labeled_batches(trainer, 3)
    halves = []
    for rank in range(2):
        part = data.trainer("Supervised", **SWITCH)
        part.ranks, part.batch_size = Ranks(rank, 2, store=torch.distributed.HashStore()), 2
        halves.append(labeled_batches(part, 3))
    for batch, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(torch.cat([part["data"] for part in parts]), batch["data"])
        assert torch.equal(torch.cat([part["target"][1] for part in parts]), batch["target"][1])


@pytest.mark.parametrize("name", ["Supervised", "MeanTeacher"])
def test_a_resumed_training_ends_like_an_undisturbed_one(build, name, monkeypatch):
    data, whole = build(name, {"labeled": 3, "labeled_batch": 2}, **SWITCH)
    whole.run_training()
    weights = {key: value.clone() for key, value in whole.network.state_dict().items()}
    Path(whole.output_folder, "checkpoint_final.pth").unlink()

    first = data.trainer(name, **SWITCH)
    real = first.train_step

    def train_step(batch):
        losses = real(batch)
        if first.iteration == 3:
            Path(first.output_folder, "stop").touch()
        return losses

    monkeypatch.setattr(first, "train_step", train_step)
    with pytest.raises(SystemExit):
        first.run_training()

    again = data.bare_trainer(name)
    again.load_checkpoint(str(Path(again.output_folder, "checkpoint_latest.pth")))
    assert again.iteration == 3
    assert (again.atlas_augmentation, again.atlas_correspondence) == ("regional_switch", "relative")
    again.run_training()
    assert all(torch.equal(value, weights[key]) for key, value in again.network.state_dict().items())


def test_one_labeled_case_is_refused_with_one_message(tmp_path, monkeypatch):
    data = Tiny(labeled=1).write(tmp_path, monkeypatch)
    trainer = data.bare_trainer("Supervised")
    trainer.configure(SWITCH)
    with pytest.raises(UserError, match="at least 2 labeled cases") as caught:
        check_requirements(trainer)
    assert "--atlas-augmentation none" in caught.value.fix
    trainer.configure({"atlas_augmentation": "none"})
    check_requirements(trainer)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("switch_probability", 1.5),
        ("switch_boxes", (0, 3)),
        ("switch_boxes", (3, 1)),
        ("switch_boxes", (3,)),
        ("switch_edges", (0.0, 0.5)),
        ("switch_edges", (0.5, 0.25)),
        ("switch_edges", (0.5, 1.5)),
    ],
)
def test_unusable_numbers_are_refused(tmp_path, monkeypatch, name, value):
    trainer = Tiny().write(tmp_path, monkeypatch).bare_trainer("Supervised")
    trainer.configure(SWITCH | {name: value})
    with pytest.raises(UserError, match=name):
        check_requirements(trainer)


def test_the_flag_is_recorded_and_what_is_set_comes_first(tmp_path, monkeypatch):
    data = Tiny().write(tmp_path, monkeypatch)
    threads = torch.get_num_threads()

    def recorded(*flags: str) -> dict:
        budget = ("--epochs", "1", "--iterations-per-epoch", "1", "-device", "cpu", "--overwrite")
        assert run_command("train", ["901", "Supervised", "all", *budget, *flags]) == 0
        folder = data.folder / "nnUNet_results" / "Dataset901_Tiny" / f"Supervised__{PLANS}__3d_fullres" / "fold_all"
        return json.loads((folder / "run.json").read_text())["hyperparameters"]

    flag = ("--atlas-augmentation", "regional_switch")
    values = recorded(*flag)
    assert (values["atlas_augmentation"], values["atlas_correspondence"]) == ("regional_switch", "relative")
    assert recorded(*flag, "--set", "atlas_augmentation=none")["atlas_augmentation"] == "none"
    torch.set_num_threads(threads)


def test_the_plan_decides_where_positions_correspond(build):
    data, _ = build("Supervised")
    plans = json.loads((data.base / f"{PLANS}.json").read_text())
    plans["configurations"]["3d_fullres"]["semi_supervised"]["atlas_correspondence"] = "bbox"
    (data.base / f"{PLANS}.json").write_text(json.dumps(plans))
    trainer = data.trainer("Supervised", **SWITCH)
    assert trainer.atlas_correspondence == "bbox"
    with pytest.raises(UserError, match="where the classes lie"):
        trainer.get_dataloaders()
    boxes = {"labeled_0": [[0.1, 0.6]] * 3, "labeled_1": [[0.2, 1.0]] * 3}
    (data.base / "dataset_fingerprint.json").write_text(json.dumps({"class_places": {"boxes": boxes}}))
    streams = trainer.get_dataloaders()
    frames = streams[0].labeled._loader.dataset.source.correspondence.frames
    np.testing.assert_allclose(frames["labeled_1"].from_common(np.ones(3)), 1)
    assert data.trainer("Supervised", **SWITCH, atlas_correspondence="relative").atlas_correspondence == "relative"
    assert data.trainer("Supervised").atlas_correspondence is None
