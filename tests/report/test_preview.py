from __future__ import annotations

import os

import matplotlib.image
import numpy as np
import pytest
import torch

from nnssl.cli import run
from nnssl.pictures.patches import Patch, cut, save_patches
from nnssl.report.recorder import NO_LABEL, Recorder
from nnssl.trainers.engine.preview import label_map
from nnssl.trainers.registry import registered_trainers
from tests.support.tiny import Tiny


def record(data, trainer, steps: int = 1):
    recorder = Recorder(trainer)
    with recorder.watching():
        for recorder.step in range(steps):
            trainer.train_step(data.batch(recorder.step))
    return recorder.passes


def test_the_supervised_student_is_told_the_labels(build):
    data, trainer = build("Supervised", {"labeled_batch": 2})
    first, second = record(data, trainer, 2)
    assert (first.network, first.step, second.step) == ("student", 0, 1)
    assert torch.equal(first.images[:2], data.batch(0)["data"])
    assert torch.equal(second.labels[:2], data.batch(1)["target"][0][:, 0])


@pytest.mark.parametrize("name", registered_trainers())
def test_what_enters_the_student_of_any_method_is_seen(build, name):
    data, trainer = build(name, {"labeled_batch": registered_trainers()[name].min_labeled_patches})
    trainer.iteration = trainer.pretrain_steps
    passes = record(data, trainer)
    assert "student" in {seen.network for seen in passes}
    assert all(seen.images.shape[2:] == seen.labels.shape[1:] == data.patch for seen in passes)


def test_a_teacher_sees_unlabeled_patches_and_the_student_all(build):
    data, trainer = build("MeanTeacher", {"labeled_batch": 2, "unlabeled_batch": 3}, student_view="strong")
    student, teacher = record(data, trainer)
    batch = data.batch()
    assert (student.network, teacher.network) == ("student", "teacher")
    assert torch.equal(student.images[:2], batch["data"])
    assert not torch.allclose(student.images[2:], batch["unlabeled"], atol=0.2)
    assert torch.allclose(teacher.images, batch["unlabeled"], atol=0.21)
    assert torch.equal(student.labels[:2], batch["target"][0][:, 0])
    assert (student.labels[2:] == NO_LABEL).all()
    assert (teacher.labels == NO_LABEL).all()


def test_mixed_patches_are_told_both_kinds_of_labels(build):
    data, trainer = build("BCP", {"labeled_batch": 2, "unlabeled_batch": 2}, pretrain_share=0.0)
    student = next(seen for seen in record(data, trainer) if seen.network == "student")
    batch = data.batch()
    assert (student.labels != NO_LABEL).all()
    for image, label, *sources in zip(
        student.images, student.labels, batch["data"], batch["target"][0][:, 0], batch["unlabeled"], strict=True
    ):
        labeled, target, unlabeled = sources
        from_labeled = (image == labeled).all(0)
        assert 0 < from_labeled.float().mean() < 1
        assert torch.equal(torch.where(from_labeled, labeled, unlabeled), image)
        assert torch.equal(label[from_labeled], target[from_labeled])


def test_regions_are_numbered(build):
    data, trainer = build("Supervised", {"regions": True})
    target = torch.zeros(1, 2, *data.patch, dtype=torch.bool)
    target[:, 0, :8], target[:, 1, :4] = True, True
    labels = label_map(trainer, target)
    assert (labels[0, :4] == 2).all()
    assert (labels[0, 4:8] == 1).all()
    assert (labels[0, 8:] == 0).all()


def test_passes_beside_the_shared_block_are_seen_and_nothing_is_left_behind(build):
    data, trainer = build("Supervised")
    images = data.batch()["data"].to(trainer.device)
    recorder = Recorder(trainer)
    with recorder.watching():
        trainer.network.encoder(images)
        trainer.network.encoder.stages[1](torch.zeros(1, 4, *data.patch, device=trainer.device))
    assert len(recorder.passes) == 1
    assert torch.equal(recorder.passes[0].images, images.cpu())
    trainer.network.encoder(images)
    trainer.heads(trainer.network, images)
    assert len(recorder.passes) == 1
    assert "heads" not in vars(trainer)


def test_slices_lie_across_the_largest_spacing_where_the_labels_are():
    labels = np.zeros((6, 8, 10), int)
    labels[4, 2:5, 2:5] = 1
    image = np.arange(480.0).reshape(6, 8, 10)
    shown, contour, aspect = cut(Patch("", image, labels), (3, 1, 2))
    assert aspect == 0.5
    np.testing.assert_array_equal(shown, image[4])
    np.testing.assert_array_equal(contour, labels[4])
    shown, contour, _ = cut(Patch("", image, None), (1, 1, 3))
    np.testing.assert_array_equal(shown, image[:, :, 5])
    assert contour is None


def test_contours_have_the_color_of_their_class(tmp_path):
    labels = np.zeros((16, 16), int)
    labels[4:12, 4:12] = 1
    image = np.random.default_rng(0).normal(size=(16, 16))
    pictures = []
    for name, mask in (("with", labels), ("without", None)):
        file = save_patches(tmp_path / f"{name}.png", [Patch("a", image, mask)] * 5, {1: "one"}, (1.0, 1.0))
        pictures.append(matplotlib.image.imread(file)[..., :3])
    blue = [(np.abs(p - np.array((31, 119, 180)) / 255).max(-1) < 0.05).sum() for p in pictures]
    assert blue[0] > blue[1] + 500


@pytest.mark.parametrize(
    ("options", "flags", "kinds"),
    [
        (
            {"labeled_batch": 2},
            ("-tr", "MeanTeacher", "--atlas-augmentation", "regional_switch"),
            {"stream_labeled", "stream_unlabeled", "input_student", "input_teacher"},
        ),
        ({"dimensions": 2, "regions": True}, ("-tr", "Supervised"), {"stream_labeled", "input_student"}),
        (
            {"labeled_batch": 2},
            ("-tr", "BCP", "--set", "pretrain_share=0.5"),
            {"stream_labeled", "stream_unlabeled", "input_student", "input_teacher"},
        ),
        ({"labeled_batch": 2}, ("-tr", "auto", "--set", "num_epochs=1"), {"stream_labeled", "input_student"}),
    ],
)
def test_the_command_writes_pictures_and_nothing_else(tmp_path, monkeypatch, capsys, options, flags, kinds):
    data = Tiny(**options).write(tmp_path / "data", monkeypatch)
    threads, environment = torch.get_num_threads(), dict(os.environ)
    output = tmp_path / "pictures"
    assert run("preview", ["-d", "901", "-f", "all", "-o", str(output), "-device", "cpu", *flags]) == 0
    torch.set_num_threads(threads)
    assert {file.stem for file in output.iterdir()} == kinds
    assert all(matplotlib.image.imread(file).std() > 0 for file in output.iterdir())
    assert not any((data.folder / "nnUNet_results").iterdir())
    assert dict(os.environ) == environment
    assert str(output / "stream_labeled.png") in capsys.readouterr().out


def test_a_checkpoint_gives_step_and_weights(build, tmp_path):
    data, trainer = build("MeanTeacher", {"labeled_batch": 2})
    trainer.run_training()
    file = str(next((data.folder / "nnUNet_results").rglob("checkpoint_final.pth")))
    flags = ["-d", "901", "-tr", "MeanTeacher", "-f", "all", "-o", str(tmp_path / "p"), "-device", "cpu", "-chk", file]
    assert run("preview", [*flags, "--steps", "1"]) == 0
    assert (tmp_path / "p" / "input_teacher.png").is_file()


def test_reconstructions_stand_beside_their_patches(tmp_path, monkeypatch):
    data = Tiny(labeled=2, labeled_batch=2, unlabeled_batch=1).write(tmp_path / "data", monkeypatch)
    drawn = {}

    def save_patches(path, patches, *_, columns, **__):
        drawn[path.stem] = patches, columns
        return path

    monkeypatch.setattr("nnssl.report.preview.save_patches", save_patches)
    threads = torch.get_num_threads()
    flags = ["-d", "901", "-tr", "EFSMedSeg", "-f", "all", "-o", str(tmp_path / "p"), "-device", "cpu", "--steps", "2"]
    assert run("preview", flags) == 0
    torch.set_num_threads(threads)
    patches, columns = drawn["method"]
    assert columns == 3
    assert [patch.title for patch in patches[:3]] == ["step 0, patch 0", "reconstruction", "weights"]
    assert len(patches) == 2 * 3 * columns
    shown = [patch.image for patch in drawn["input_student"][0]]
    for row in range(6):
        patch, reconstruction, weights = (one.image for one in patches[3 * row : 3 * row + 3])
        assert np.array_equal(patch, shown[row])
        assert reconstruction.shape == weights.shape == patch.shape == data.patch
        # in the beginning all voxels weigh the same
        assert (weights == 1).all()
        assert reconstruction.std() > 0


def test_what_cannot_be_trained_is_refused(tmp_path, monkeypatch, capsys):
    Tiny(labeled=1).write(tmp_path / "data", monkeypatch)
    flags = ["-d", "901", "-tr", "Supervised", "-f", "all", "-o", str(tmp_path / "p"), "-device", "cpu"]
    assert run("preview", [*flags, "--atlas-augmentation", "regional_switch"]) == 2
    assert "at least 2 labeled cases" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_steps_are_a_number_from_1(capsys):
    for text in ("x", "0", "-1", "1.5"):
        with pytest.raises(SystemExit):
            run("preview", ["-d", "1", "-tr", "A", "-f", "0", "-o", "x", f"--steps={text}"])
        assert f"--steps: {text!r} is not a whole number from 1" in capsys.readouterr().err
