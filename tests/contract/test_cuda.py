"""What every registered trainer must hold on CUDA, as far as a machine without a GPU can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool3d, binary_cross_entropy, conv3d, cross_entropy, interpolate

from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.micro_batch import obstacle_to_parts
from nnssl.trainers.engine.rehearsal import _batch
from nnssl.trainers.registry import registered_trainers, trainer_names
from tests.support.determinism import refused_on_cuda
from tests.support.hollow_cuda import hollow_cuda
from tests.support.tiny import DEVICE, Tiny

NAMES = trainer_names()

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU tells more: NNSSL_TEST_DEVICE=cuda pytest tests/contract"
)


def _steps(trainer: Any, batch: Callable[[], dict[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
    """Losses of a step at the beginning of each phase and of the last one."""
    last = trainer.num_epochs * trainer.num_iterations_per_epoch - 1
    for iteration in dict.fromkeys((0, trainer.pretrain_steps, *trainer.phase_starts, last)):
        trainer.iteration = iteration
        yield trainer.train_step(batch())


# ---------------------------------------------------------------------- devices and number formats


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dimensions": 2, "classes": 3, "regions": True},
        {"labeled_batch": 3, "unlabeled_batch": 3, "micro_batch": 2},
    ],
    ids=["3D", "2D and regions", "micro-batches"],
)
@pytest.mark.parametrize("name", NAMES)
def test_all_of_a_step_is_on_the_device(name, options, tiny, monkeypatch):
    """Not with an ignore label: nnU-Net's loss then asks how many voxels are annotated."""
    if not registered_trainers()[name].supports_regions:
        options = options | {"regions": False}
    data = tiny(**options)
    with hollow_cuda(monkeypatch) as device:
        trainer = data.trainer(name)
        if obstacle_to_parts(trainer) is not None:  # which is refused before the first step
            trainer.settings.micro_batch = None
        trainer.network.train()
        assert trainer.precision.name == "fp16"
        steps = _steps(trainer, lambda: _batch(trainer))
        assert {(loss.device, loss.dtype) for losses in steps for loss in losses.values()} == {(device, torch.float32)}
        assert {tensor.device for tensor in unwrap(trainer.deployed_network()).state_dict().values()} == {device}


def test_tensors_that_meet_on_two_devices_are_found(monkeypatch):
    with hollow_cuda(monkeypatch) as device:
        there = torch.ones(3, device=device)
        with pytest.raises(RuntimeError, match="device"):
            there + torch.ones(3)


def test_number_formats_are_those_of_cuda(monkeypatch):
    with hollow_cuda(monkeypatch) as device, torch.autocast("cuda", dtype=torch.float16):
        image = torch.rand(1, 1, 4, 4, 4, device=device)
        assert conv3d(image, torch.rand(1, 1, 3, 3, 3, device=device)).dtype == torch.float16
        assert image.half().log_softmax(1).dtype == torch.float32
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            binary_cross_entropy(image, image)


# ---------------------------------------------------------------------- scaled losses


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_scaler_changes_nothing(name, tiny):
    data = tiny()
    ends = []
    for scaler in (None, torch.amp.GradScaler(DEVICE.type, init_scale=2.0**8)):
        trainer = data.trainer(name)
        trainer.grad_scaler = scaler
        losses = list(_steps(trainer, data.batch))
        ends.append((losses, _weights(trainer)))
    assert trainer.grad_scaler.get_scale() == 2.0**8
    # Adam divides by the size of a gradient, so that rounding shows where it is next to nothing
    torch.testing.assert_close(*ends, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_overflows_leaves_nothing_behind(name, tiny):
    """Numbers of fp16 do, and nnU-Net's training goes on."""
    data = tiny()
    trainer = data.trainer(name)
    trainer.grad_scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**8)
    list(_steps(trainer, data.batch))
    student = [value.clone() for value in unwrap(trainer.network).state_dict().values()]
    batch = data.batch(9)
    for images in ("data", "unlabeled"):
        batch[images].fill_(torch.inf)
    trainer.iteration -= 1
    assert not trainer.train_step(batch)["loss"].isfinite()
    after = unwrap(trainer.network).state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(student, after, strict=True))
    assert trainer.grad_scaler.get_scale() < 2.0**8
    assert all(value.isfinite().all() for value in _weights(trainer).values() if value.is_floating_point())
    trainer.iteration -= 1
    assert all(loss.isfinite() for loss in trainer.train_step(data.batch(10)).values())


def _weights(trainer: Any) -> dict[str, torch.Tensor]:
    modules = {"student": unwrap(trainer.network), **trainer._modules}
    return {f"{name}.{key}": value.clone() for name, m in modules.items() for key, value in m.state_dict().items()}


# ---------------------------------------------------------------------- deterministic mode


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_has_deterministic_kernels(name, dimensions, tiny):
    data = tiny(dimensions=dimensions)
    trainer = data.trainer(name)
    with refused_on_cuda() as found:
        list(_steps(trainer, data.batch))
    assert found == []


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_weighted_classes_have_deterministic_kernels(power, tmp_path, monkeypatch):
    data = Tiny().write(tmp_path, monkeypatch)
    trainer = data.trainer("Supervised", rare_class_power=power)
    with refused_on_cuda() as found:
        trainer.train_step(data.batch())
    assert found == []


def test_operations_that_have_none_are_found():
    torch.use_deterministic_algorithms(True)
    logits, labels = torch.randn(1, 2, 4, 4, 4, requires_grad=True), torch.zeros(1, 4, 4, 4, dtype=torch.long)
    with refused_on_cuda() as found:
        cross_entropy(logits, labels)
        cross_entropy(logits, labels, reduction="none")
        avg_pool3d(logits, 2).sum().backward()
        interpolate(logits, scale_factor=2, mode="trilinear").sum().backward()
        interpolate(logits, scale_factor=2, mode="nearest").sum().backward()
    assert found == ["nll_loss2d_forward", "avg_pool3d_backward", "upsample_trilinear3d_backward"]
