from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from nnssl.errors import UserError
from tests.support.tiny import PLANS, Tiny


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    yield Tiny().write(tmp_path, monkeypatch)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("axes", "trained", "predicted"),
    [((), (), None), ((0, 2), (0, 2), (0, 2)), (None, (0, 1, 2), (0, 1, 2))],
)
def test_mirror_axes_hold_for_training_and_prediction(tiny, axes, trained, predicted):
    trainer = tiny.trainer("Supervised", mirror_axes=axes)
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == trained
    assert trainer.inference_allowed_mirroring_axes == predicted


def plan_mirror_axes(tiny: Tiny, axes: list[int]) -> None:
    file = tiny.base / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    plans["configurations"][tiny.configuration]["semi_supervised"]["mirror_axes"] = axes
    file.write_text(json.dumps(plans))


@pytest.mark.parametrize(
    ("planned", "given", "trained", "predicted"),
    [([1], None, (1,), (1,)), ([], None, (), None), ([1], (0, 2), (0, 2), (0, 2)), ([1], (), (), None)],
)
def test_mirror_axes_of_the_plan_hold_unless_they_are_set(tiny, planned, given, trained, predicted):
    plan_mirror_axes(tiny, planned)
    trainer = tiny.trainer("Supervised", mirror_axes=given)
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == trained
    assert trainer.inference_allowed_mirroring_axes == predicted
    assert trainer.hyperparameter_values()["mirror_axes"] == trained


def test_mirror_axes_of_a_2d_plan(tmp_path, monkeypatch):
    tiny = Tiny(dimensions=2).write(tmp_path, monkeypatch)
    plan_mirror_axes(tiny, [1])
    trainer = tiny.trainer("Supervised")
    torch.use_deterministic_algorithms(False)
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == (1,)


def test_a_continued_training_keeps_its_mirror_axes(tiny, tmp_path):
    plan_mirror_axes(tiny, [1])
    trainer = tiny.trainer("Supervised")
    trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    trainer.train_step(tiny.batch())
    trainer.save_checkpoint(str(tmp_path / "stopped.pth"))
    plan_mirror_axes(tiny, [0, 2])
    continued = tiny.bare_trainer("Supervised")
    continued.load_checkpoint(str(tmp_path / "stopped.pth"))
    assert continued.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == (1,)
    assert continued.inference_allowed_mirroring_axes == (1,)


@pytest.mark.parametrize(
    ("dimensions", "patch_size", "degrees"), [(3, [16, 16, 16], 30), (3, [4, 16, 16], 180), (2, [16, 16], 180)]
)
def test_rotation_is_nnunets_unless_it_is_set(tmp_path, monkeypatch, dimensions, patch_size, degrees):
    tiny = Tiny(dimensions=dimensions).write(tmp_path, monkeypatch)
    trainer = tiny.bare_trainer("Supervised")
    trainer.configuration_manager.configuration["patch_size"] = patch_size

    def geometry(degrees):
        trainer.rotation_degrees = degrees
        rotation, _, initial_patch_size, _ = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return rotation, list(initial_patch_size)

    expected, initial_patch_size = geometry(None)
    assert geometry(degrees) == (pytest.approx(expected), initial_patch_size)
    # what scaling needs remains
    assert geometry(0) == ((0, 0), [4 if length == 4 else 18 for length in patch_size])


def test_rotation_reaches_the_transforms(tiny):
    def ranges(**settings):
        trainer = tiny.trainer("Supervised", **settings)
        found, make = set(), trainer.get_training_transforms

        def note(patch_size, rotation, *args, **kwargs):
            found.add(rotation)
            return make(patch_size, rotation, *args, **kwargs)

        trainer.get_training_transforms = note
        trainer.on_train_start()
        return found

    assert ranges(rotation_degrees=90.0) == {(-math.pi / 2, math.pi / 2)}
    with pytest.raises(UserError, match="rotation_degrees"):
        ranges(rotation_degrees=200.0)


def test_unlabeled_patches_per_step_come_from_the_plan_unless_set(tiny):
    assert tiny.trainer("MeanTeacher").num_unlabeled == 2
    assert tiny.trainer("MeanTeacher", unlabeled_batch_size=3).num_unlabeled == 3
    assert tiny.trainer("Supervised").num_unlabeled == 0


def test_settings_cannot_change_after_initialize(tiny):
    with pytest.raises(RuntimeError, match="before initialize"):
        tiny.trainer("Supervised").configure({"initial_lr": 1.0})


def test_a_loss_that_is_not_finite_ends_the_training_with_its_name(tiny, monkeypatch):
    trainer = tiny.trainer("MeanTeacher")
    monkeypatch.setattr(trainer, "unsupervised_loss", lambda step: {"consistency": torch.tensor(float("nan"))})
    with pytest.raises(UserError, match="not finite: loss, consistency"):
        trainer.run_training()


def _overflows(trainer, monkeypatch, steps, counted=True):
    """A loss scaler as in fp16, and numbers that overflow in some of the steps, in a loss or beside it."""
    trainer.grad_scaler = torch.amp.GradScaler(trainer.device.type, init_scale=2.0**8)
    name = "unsupervised_loss" if counted else "optimize"
    real = getattr(trainer, name)

    def overflowing(step):
        losses = real(step)
        if step.iteration in steps:
            losses["consistency"] = losses["consistency"] * torch.inf
        return losses

    monkeypatch.setattr(trainer, name, overflowing)


@pytest.mark.parametrize("counted", [True, False])
def test_steps_that_overflow_in_fp16_are_left_out_and_told(tiny, monkeypatch, capsys, counted):
    trainer = tiny.trainer("MeanTeacher")
    _overflows(trainer, monkeypatch, {2}, counted)
    trainer.run_training()
    assert trainer.iteration == 4
    assert all(math.isfinite(value) for row in trainer.history.rows for value in row.values())
    told = [line for line in capsys.readouterr().out.splitlines() if "WARNING: in 1 of 2 steps of epoch 1" in line]
    assert len(told) == 1


@pytest.mark.parametrize(("counted", "named"), [(True, "loss, consistency"), (False, "consistency")])
def test_an_epoch_that_overflows_throughout_ends_the_training(tiny, monkeypatch, counted, named):
    trainer = tiny.trainer("MeanTeacher")
    _overflows(trainer, monkeypatch, {2, 3}, counted)
    with pytest.raises(UserError, match=f"not finite: {named}"):
        trainer.run_training()
    assert len(trainer.history.rows) == 1


def test_gradients_that_overflow_at_any_scale_end_the_training(tiny, monkeypatch):
    trainer = tiny.trainer("Supervised")
    trainer.grad_scaler = torch.amp.GradScaler(trainer.device.type, init_scale=2e-6)
    for parameter in trainer.network.parameters():
        parameter.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(UserError, match="gradients are not finite"):
        trainer.run_training()


def test_a_stop_after_a_step_that_overflowed_saves(tiny, monkeypatch):
    trainer = tiny.trainer("MeanTeacher")
    _overflows(trainer, monkeypatch, {0})
    real = trainer.after_step
    stop = Path(trainer.output_folder, "stop")
    monkeypatch.setattr(trainer, "after_step", lambda step: (real(step), stop.touch()))
    with pytest.raises(SystemExit):
        trainer.run_training()
    assert Path(trainer.output_folder, "checkpoint_latest.pth").is_file()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory of cpu does not suffice"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "memory of cpu does not suffice"),
        (RuntimeError("avg_pool3d_backward_cuda does not have a deterministic implementation, but"), "--deterministic"),
        (torch._dynamo.exc.TorchDynamoException("Failed to find C compiler."), "nnUNet_compile=f"),
    ],
)
def test_what_the_device_refuses_is_told_in_one_message(tiny, monkeypatch, error, told):
    trainer = tiny.trainer("Supervised")
    begun = []

    def refuse(*args):
        raise error

    monkeypatch.setattr(trainer, "forward", refuse)
    with pytest.raises(UserError, match=told) as caught:
        trainer.run_training(begin=lambda: lambda: begun.append(True))
    assert "step 0: Supervised on cpu in fp32, 1 labeled and 0 unlabeled patches of 16x16x16" in str(caught.value)
    assert not begun, "an earlier training's results are removed then"


def test_other_errors_of_a_step_stay_as_they_are(tiny, monkeypatch):
    trainer = tiny.trainer("Supervised")
    monkeypatch.setattr(trainer, "forward", lambda step: step.labeled @ torch.ones(5))
    with pytest.raises(RuntimeError, match="size"):
        trainer.run_training()


def test_a_training_begins_once(tiny):
    trainer, begun = tiny.trainer("Supervised"), []

    def begin():
        begun.append(trainer.iteration)
        return lambda: begun.append(trainer.iteration)

    trainer.run_training(begin)
    assert begun == [0, 1]


def test_too_few_unlabeled_cases_are_told_before_training(tmp_path, monkeypatch):
    trainer = Tiny(unlabeled=0).write(tmp_path, monkeypatch).bare_trainer("MeanTeacher")
    with pytest.raises(UserError, match="needs at least 1 unlabeled case"):
        trainer.run_training()


def test_pretrained_weights_start_student_and_teacher(tiny, tmp_path):
    from nnssl.networks.unwrap import unwrap
    from nnssl.trainers.engine.run_settings import RunSettings

    first = tiny.trainer("Supervised")
    first.train_step(tiny.batch())
    file = tmp_path / "weights.pth"
    first.save_checkpoint(str(file))
    second = tiny.bare_trainer("MeanTeacher")
    second.configure({}, RunSettings(seed=7, pretrained_weights=str(file)))
    second.initialize()
    source = unwrap(first.network).state_dict()
    for network in (unwrap(second.network), second.teacher.network):
        own = network.state_dict()
        heads = [key for key in own if ".seg_layers." in key]
        assert heads
        assert all(torch.equal(own[key], source[key]) for key in own if key not in heads)
        assert not all(torch.equal(own[key], source[key]) for key in heads)


def test_pretrained_weights_of_another_network_are_refused(tiny, tmp_path, monkeypatch):
    from nnssl.trainers.engine.run_settings import RunSettings

    trainer = tiny.trainer("Supervised")
    file = tmp_path / "weights.pth"
    trainer.save_checkpoint(str(file))
    other = Tiny(channels=2).write(tmp_path / "other", monkeypatch).bare_trainer("Supervised")
    other.configure({}, RunSettings(seed=0, pretrained_weights=str(file)))
    with pytest.raises(UserError, match="do not fit"):
        other.initialize()


def test_checkpoint_of_another_trainer_is_refused(tiny, tmp_path):
    file = tmp_path / "checkpoint.pth"
    tiny.trainer("Supervised").save_checkpoint(str(file))
    with pytest.raises(UserError, match="another trainer"):
        tiny.bare_trainer("MeanTeacher").load_checkpoint(str(file))


def test_a_full_disk_leaves_the_previous_checkpoint_intact(tiny, tmp_path, monkeypatch):
    trainer = tiny.trainer("Supervised")
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()

    def full(content, path):
        path.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".tmp_")] == []
