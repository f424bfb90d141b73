from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch

from nnssl.cli import run
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine import preview
from nnssl.trainers.registry import trainer_names
from tests.support.tiny import Tiny

BESIDE = {"teacher", "second", "frozen_teacher"}


@pytest.fixture
def drawn(monkeypatch):
    """Instead of drawing: what would have been drawn."""
    calls = []

    def save_patches(path, patches, class_names, spacing, **options):
        calls.append((path, patches, class_names, spacing, options))
        return path

    monkeypatch.setattr(preview, "save_patches", save_patches)
    return calls


@pytest.mark.parametrize(
    ("every", "epochs", "seconds", "due"),
    [
        (None, 100, 61, list(range(5, 101, 5))),
        (None, 39, 61, [*range(2, 39, 2), 39]),
        (None, 100, 59, [100]),
        (None, 10, 61, list(range(1, 11))),
        (None, 10, 59, [10]),
        (4, 10, 0, [4, 8, 10]),
        (0, 10, 61, []),
    ],
)
def test_when_a_picture_is_due(build, every, epochs, seconds, due):
    _, trainer = build("Supervised", num_epochs=epochs)
    trainer.settings = replace(trainer.settings, preview_every=every)
    found = [epoch for epoch in range(1, epochs + 1) if preview.preview_is_due(trainer, epoch, seconds)]
    assert found == due


def test_rows_are_patches_and_what_student_and_teacher_make_of_them(build, drawn):
    data, trainer = build("MeanTeacher", {"labeled_batch": 2, "unlabeled_batch": 2})
    with torch.no_grad():
        for parameter in trainer.teacher.parameters():
            parameter.mul_(0.5)
    batch = data.batch()
    del batch["pseudo_target"]
    # most foreground in the second labeled patch, there in slice 3
    batch["target"][0][:] = 0
    batch["target"][0][0, 0, 5, :4] = 1
    batch["target"][0][1, 0, 3, :8] = 1
    trainer.network.train()
    preview.save_preview_of_epoch(trainer, batch, 3)
    ((path, patches, names, spacing, options),) = drawn
    assert path.name == "epoch_0003.png"
    assert names == {1: "class_1"}
    assert len(spacing) == 2
    assert [patch.title for patch in patches[:5]] == [
        "labeled",
        "student",
        "student, confidence",
        "teacher",
        "teacher, confidence",
    ]
    assert [patch.title for patch in patches[5:]][:2] == ["unlabeled", "student"]
    assert len(patches) == 2 * options["columns"] == 10
    torch.testing.assert_close(torch.from_numpy(patches[0].image), batch["data"][1, 0, 3])
    assert (patches[0].labels == batch["target"][0][1, 0, 3].numpy()).all()
    assert patches[5].labels is None
    trainer.network.eval()
    images = batch["data"].to(trainer.device)
    for column, network in ((1, trainer.network), (3, trainer.teacher)):
        with torch.no_grad():
            logits = trainer.heads(network, images)[0][1, :, 3].cpu()
        most, second = logits.softmax(0).topk(2, dim=0).values
        assert (patches[column].labels == logits.argmax(0).numpy()).all()
        torch.testing.assert_close(torch.from_numpy(patches[column + 1].image), most - second, atol=1e-4, rtol=0)
        assert patches[column + 1].is_confidence
    assert not torch.equal(torch.from_numpy(patches[2].image), torch.from_numpy(patches[4].image))


def test_the_slice_of_a_patch_without_annotation_shows_the_prediction_and_modes_are_kept(build, drawn):
    data, trainer = build("CPS", {"unlabeled_batch": 2})
    batch = {**data.batch(), "pseudo_target": None}
    seen = torch.zeros(1, 1, *data.patch)
    seen[..., 9, 2:9, 2:9] = 1
    # a student that sees foreground in slice 9 of the second patch only
    trainer.hard_labels = lambda logits: seen * torch.tensor([0, 1])[-len(logits) :].view(-1, 1, 1, 1, 1)
    trainer.network.train()
    trainer.second.eval()
    preview.save_preview_of_epoch(trainer, batch, 1)
    assert unwrap(trainer.network).decoder.training
    assert not trainer.second.decoder.training
    patches = drawn[0][1]
    assert [patch.title for patch in patches[5:8]] == ["unlabeled", "student", "student, confidence"]
    assert patches[5].labels is None
    torch.testing.assert_close(torch.from_numpy(patches[5].image), batch["unlabeled"][1, 0, 9])
    assert (patches[6].labels == seen[0, 0, 9].numpy()).all()


def test_what_is_ignored_is_no_foreground_and_an_empty_patch_is_cut_in_the_middle(build, drawn):
    data, trainer = build("Supervised", {"ignore": True, "labeled_batch": 2})
    batch = {**data.batch(), "unlabeled": None, "pseudo_target": None}
    batch["target"][0][:] = 0
    batch["target"][0][0] = trainer.label_manager.ignore_label
    batch["target"][0][1, 0, 5, 3, 3] = 1
    preview.save_preview_of_epoch(trainer, batch, 1)
    torch.testing.assert_close(torch.from_numpy(drawn[0][1][0].image), batch["data"][1, 0, 5])
    batch["target"][0][1] = 0
    preview.save_preview_of_epoch(trainer, batch, 1)
    torch.testing.assert_close(torch.from_numpy(drawn[1][1][0].image), batch["data"][0, 0, data.patch[0] // 2])


def test_a_picture_that_cannot_be_written_is_told_and_the_training_goes_on(tmp_path, monkeypatch, capsys):
    data = Tiny().write(tmp_path / "data", monkeypatch)
    trainer = data.trainer("Supervised")
    trainer.settings.preview_every = 1
    folder = Path(trainer.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "previews").write_text("in the way")
    trainer.run_training()
    assert "no preview of epoch 2" in capsys.readouterr().out
    assert (folder / "checkpoint_final.pth").is_file()
    torch.use_deterministic_algorithms(False)


def test_regions_in_2d(build, drawn):
    data, trainer = build("Supervised", {"dimensions": 2, "regions": True, "classes": 3})
    batch = data.batch()
    labels = batch["target"][0]
    batch |= {"target": [torch.cat([labels > 0, labels == 2], 1)], "unlabeled": None, "pseudo_target": None}
    preview.save_preview_of_epoch(trainer, batch, 1)
    _, patches, names, _, _ = drawn[0]
    assert names == {1: "whole", 2: "core"}
    assert len(patches) == 3
    assert (patches[0].labels == labels[0, 0].numpy()).all()
    heads = trainer.heads(trainer.network.eval(), batch["data"].to(trainer.device))
    predicted = trainer.hard_labels(heads[0])[0].cpu()
    assert (patches[1].labels == torch.where(predicted[1], 2, predicted[0].int()).numpy()).all()


def test_a_label_in_a_list_is_named(tmp_path, monkeypatch):
    data = Tiny(classes=3).write(tmp_path, monkeypatch)
    labels = {"background": 0, "liver": [1], "tumor": 2}
    (data.base / "dataset.json").write_text(json.dumps(data.dataset_json() | {"labels": labels}))
    assert preview.class_names(data.bare_trainer("Supervised")) == {1: "liver", 2: "tumor"}


def test_pseudo_labels_of_the_stream_are_shown(build, drawn):
    data, trainer = build("SelfTraining")
    trainer.iteration = trainer.phase_starts[-1]
    batch = data.batch()
    preview.save_preview_of_epoch(trainer, batch, 1)
    unlabeled = next(patch for patch in drawn[0][1] if patch.title == "unlabeled")
    assert any((unlabeled.labels == labels.numpy()).all() for labels in batch["pseudo_target"][0].flatten(0, 2))


@pytest.mark.parametrize("name", trainer_names())
def test_segmentation_networks_of_every_method(build, name):
    data, trainer = build(name, {"labeled_batch": 2})
    networks = dict(preview.segmentation_networks(trainer))
    assert next(iter(networks)) == "student"
    images = data.batch()["data"].to(trainer.device)
    for network in networks.values():
        assert trainer.heads(network, images)[0].shape == (2, 2, *data.patch)
    others = set(trainer._modules) - set(networks)
    assert not others & BESIDE


def test_pictures_change_nothing_of_the_training(tmp_path, monkeypatch):
    weights = []
    for every in (0, 1):
        data = Tiny().write(tmp_path / str(every), monkeypatch)
        trainer = data.trainer("MeanTeacher")
        trainer.settings.preview_every = every
        trainer.run_training()
        weights.append(
            trainer.teacher.state_dict() | {f"student.{k}": v for k, v in trainer.network.state_dict().items()}
        )
        pictures = sorted((data.folder / "nnUNet_results").rglob("previews/*.png"))
        assert [file.name for file in pictures] == (["epoch_0001.png", "epoch_0002.png"] if every else [])
        assert all(matplotlib.image.imread(file).std() > 0.05 for file in pictures)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    torch.use_deterministic_algorithms(False)


def test_the_flag(tmp_path, monkeypatch, capsys):
    data = Tiny().write(tmp_path / "data", monkeypatch)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    threads = torch.get_num_threads()
    command = ["901", "Supervised", "all", "-device", "cpu", "--epochs", "3", "--iterations-per-epoch", "1"]
    assert run("train", [*command, "--preview-every", "-1"]) == 2
    assert "--preview-every" in capsys.readouterr().err
    assert run("train", [*command, "--preview-every", "2"]) == 0
    results = data.folder / "nnUNet_results"
    assert sorted(file.name for file in results.rglob("previews/*")) == ["epoch_0002.png", "epoch_0003.png"]
    assert run("train", [*command, "--overwrite", "--preview-every", "0"]) == 0
    torch.set_num_threads(threads)
    assert not list(results.rglob("previews/*"))
