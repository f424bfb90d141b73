"""How much memory a step takes, whether it is there, and what takes less."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl.errors import UserError
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine import device_memory, memory_check
from nnssl.trainers.engine.device_memory import MIB, _free_ram, _group_limits, cpu_workspace, footprint
from nnssl.trainers.engine.distributed import Ranks
from nnssl.trainers.engine.memory_meter import WORKSPACE, MemoryMeter
from nnssl.trainers.engine.micro_batch import obstacle_to_parts
from nnssl.trainers.engine.rehearsal import Changes, Estimate, _batch, rehearse
from tests.support.tiny import DEVICE, Tiny

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="figures are those of a CPU")


@pytest.fixture(autouse=True)
def _restore_determinism():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tiny]:
    return lambda **options: Tiny(**options).write(tmp_path / "data", monkeypatch)


# ---------------------------------------------------------------------- counting


def test_peak_of_a_small_network_equals_the_count_by_hand():
    with FakeTensorMode(), MemoryMeter("cpu") as meter:
        network = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1, bias=False)
        )
        network(torch.empty(1, 1, 8, 8)).sum().backward()
    weights = 4 * (4 * 9 + 2 * 4 * 9)
    image, hidden, loss, gradient_of_last_weights = 4 * 64, 4 * 4 * 64, 4, 4 * 2 * 4 * 9
    # in the backward pass through the ReLU: its output, the gradients of its output and input; the loss and its own
    assert meter.peak == weights + image + 3 * hidden + gradient_of_last_weights + 2 * loss


def test_a_tensor_counts_until_it_is_freed_and_its_views_do_not():
    with FakeTensorMode(), MemoryMeter("cpu") as meter:
        with meter.phase("first"):
            a = torch.empty(100)
        view = a.view(10, 10)[2:]
        assert meter.living.total() == 400
        del a
        with meter.phase("second"):
            b = torch.empty(50)
        assert meter.living == {"first": 400, "second": 200}
        del view, b
        assert meter.living.total() == 0
        torch.empty(20)
    assert meter.peak == 600
    assert meter.at_peak == {"first": 400, "second": 200}


def test_other_devices_do_not_count():
    with MemoryMeter("cpu") as meter:
        torch.empty(100, device="meta")
    assert meter.peak == 0


@pytest.mark.parametrize(
    ("images", "layer", "expected"),
    [
        ((1, 4, 16, 16), nn.Conv2d(4, 2, 3), 4 * 9 * 14 * 14),
        ((1, 4, 8, 8, 8), nn.Conv3d(4, 2, 3), 4 * 27 * 6**3),
        ((1, 4, 8, 8), nn.ConvTranspose2d(4, 2, 2, 2), 2 * 4 * 64),
        ((2, 4, 16, 16), nn.Conv2d(4, 2, 3), 2 * 4 * 256 + 2 * 2 * 14 * 14 + 2 * 4 * 9),
    ],
    ids=["2D", "3D", "transposed", "copies of oneDNN"],
)
def test_workspace_of_convolutions(images, layer, expected):
    sizes = []

    def workspace(*call: Any) -> int:
        sizes.append(cpu_workspace(*call))
        return sizes[-1]

    with FakeTensorMode(allow_non_fake_inputs=True), MemoryMeter("cpu", workspace=workspace) as meter:
        output = layer(torch.empty(images))
        assert max(sizes) == 4 * expected
        assert meter.at_peak[WORKSPACE] == 4 * expected
        output.sum().backward()


def test_channels_last_tensors_are_not_copied():
    layer = nn.Conv2d(4, 2, 3).to(memory_format=torch.channels_last)
    with FakeTensorMode(allow_non_fake_inputs=True), MemoryMeter("cpu", workspace=cpu_workspace) as meter:
        layer(torch.empty(2, 4, 16, 16).contiguous(memory_format=torch.channels_last))
    assert meter.at_peak[WORKSPACE] == 0


def test_footprints():
    assert 100 * MIB <= footprint("cpu")(100 * MIB) < 120 * MIB
    assert 1.2 * MIB < footprint("cpu")(MIB) < 2 * MIB
    assert 512 < footprint("cuda")(1) < 1024


# ---------------------------------------------------------------------- the rehearsal


@pytest.mark.parametrize(("optimizer", "micro_batch"), [("SGD", None), ("AdamW", 2)])
def test_a_rehearsal_counts_what_the_step_really_makes(tiny, optimizer, micro_batch):
    trainer = tiny(labeled_batch=2, micro_batch=micro_batch).trainer("MeanTeacher", optimizer_name=optimizer)
    estimate = rehearse(trainer)
    trainer.network.train()
    batch = {k: torch.zeros_like(v) if isinstance(v, torch.Tensor) else v for k, v in _batch(trainer).items()}
    batch["target"] = [torch.zeros_like(target) for target in batch["target"]]
    for _ in range(2):
        with MemoryMeter("cpu", footprint("cpu")) as meter:
            trainer.train_step(batch)
    assert WORKSPACE not in estimate.parts  # of a convolution, which would decide about the moment of the peak
    # patches and optimizer were there before the meter, as the weights were
    made = estimate.total - estimate.parts["libraries"] - estimate.parts["patches"] - estimate.held
    assert made == pytest.approx(meter.peak, rel=0.1)
    assert estimate.held == pytest.approx(1.4 * _bytes(unwrap(trainer.network), trainer.teacher), rel=0.01)


def _bytes(*modules: nn.Module) -> int:
    return sum(p.nbytes for module in modules for p in module.parameters())


def test_a_phase_before_the_main_one_is_rehearsed_too(tiny, monkeypatch):
    trainer = tiny().trainer("MeanTeacher", num_epochs=4, pretrain_share=0.5)
    seen = []
    real = type(trainer).make_step
    monkeypatch.setattr(
        type(trainer), "make_step", lambda self, batch: seen.append(self.iteration) or real(self, batch)
    )
    rehearse(trainer)
    assert seen == [0, 4, 7]


def test_neither_generators_nor_trainer_are_disturbed(tiny):
    trainer = tiny().trainer("MeanTeacher", optimizer_name="AdamW", pretrain_share=0.5)
    trainer.train_step(Tiny().batch())
    before = _state(trainer)
    unwrap(trainer.network).register_buffer("constant", torch.ones(3))
    # what an optimizer holds after a step is there already, as in a training that goes on
    assert rehearse(trainer, Changes(micro_batch=1, unlabeled=1)).held > 1.4 * 3.9 * _bytes(unwrap(trainer.network))
    assert _state(trainer) == before


def _state(trainer: Any) -> list[Any]:
    parameters = list(unwrap(trainer.network).parameters())
    return [
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        trainer.iteration,
        trainer.hyperparameter_values(),
        trainer.settings.as_dict(),
        [p.tolist() for p in (*parameters, *trainer.teacher.parameters())],
        [p.grad.tolist() for p in parameters if p.grad is not None],
        trainer.optimizer.state_dict()["state"][0]["exp_avg"].tolist(),
    ]


# ---------------------------------------------------------------------- what is there


def test_free_memory_is_read(tmp_path):
    file = tmp_path / "meminfo"
    file.write_text("MemTotal:       2000 kB\nMemFree:         500 kB\nMemAvailable:   1500 kB\n")
    assert list(_free_ram(file)) == [1500 * 1024]
    assert list(_free_ram(tmp_path / "missing")) == []


def test_room_below_all_limits_of_version_2(tmp_path):
    groups = _groups(tmp_path, "0::/user/job\n")
    _group(tmp_path / "cgroup" / "user" / "job", "max", 70)
    _group(tmp_path / "cgroup" / "user", "1000", 700, "inactive_file 40")
    assert list(_group_limits(groups, tmp_path / "cgroup")) == [340]


def test_room_below_the_limit_of_version_1(tmp_path):
    groups = _groups(tmp_path, "4:cpu,memory:/job\n3:cpuset:/other\n")
    folder = tmp_path / "cgroup" / "memory" / "job"
    _group(folder, "500", 600, "total_inactive_file 0", "memory.limit_in_bytes", "memory.usage_in_bytes")
    assert list(_group_limits(groups, tmp_path / "cgroup")) == [0]


def test_groups_that_cannot_be_seen_are_no_limit(tmp_path):
    # in a container the path is that of the machine outside
    assert list(_group_limits(_groups(tmp_path, "0::/outside/job\n"), tmp_path / "cgroup")) == []
    assert list(_group_limits(tmp_path / "missing", tmp_path / "cgroup")) == []


def _groups(folder: Path, text: str) -> Path:
    (folder / "groups").write_text(text)
    return folder / "groups"


def _group(
    folder: Path, limit: str, usage: int, statistics: str = "", limit_file="memory.max", usage_file="memory.current"
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_file).write_text(limit + "\n")
    (folder / usage_file).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(statistics)


def test_this_machine_has_memory_and_other_devices_do_not_tell():
    assert device_memory.available(torch.device("cpu")) > MIB
    assert device_memory.available(torch.device("meta")) is None


# ---------------------------------------------------------------------- the check


@pytest.fixture
def checked(tiny, monkeypatch) -> Callable[..., Any]:
    """A trainer whose memory will be checked, and whose device has so many bytes left."""

    def make(room: int | None, **options: Any) -> Any:
        trainer = tiny(labeled_batch=2, unlabeled_batch=4, **options).trainer("MeanTeacher")
        trainer.settings.memory_check = True
        monkeypatch.setattr(memory_check, "available", lambda device: room)
        return trainer

    return make


@pytest.fixture
def estimates(monkeypatch) -> Callable[..., None]:
    """Sets what rehearsals find: so many bytes, times what is set for a change."""

    def set_to(**shares: float) -> None:
        def rehearsed(trainer: Any, changes: Changes | None = None) -> Estimate:
            changes, total = changes or Changes(), 1000.0
            if changes.micro_batch:
                total *= shares.get("per_patch", 1) * changes.micro_batch
            if changes.precision:
                total *= shares.get("precision", 1)
            if changes.unlabeled:
                total *= shares.get("per_unlabeled", 1) * changes.unlabeled
            return Estimate(Counter(student=int(total * MIB)), 0)

        monkeypatch.setattr(memory_check, "rehearse", rehearsed)

    return set_to


def test_one_line_tells_the_estimate_where_it_fits(checked, capsys):
    trainer = checked(64 * 1024 * MIB)
    trainer.on_train_start()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "memory of a step" in line]
    for part in ("about", "student", "unsupervised terms", "backward pass", "weights", "available 64.0 GiB"):
        assert part in line


def test_what_does_not_fit_is_refused_before_the_streams_are_opened(checked, estimates, monkeypatch):
    trainer = checked(MIB)
    estimates()
    monkeypatch.setattr(type(trainer), "get_dataloaders", lambda self: pytest.fail("streams were opened"))
    with pytest.raises(UserError) as refusal:
        trainer.run_training()
    text = str(refusal.value)
    for part in (
        "does not fit",
        "MeanTeacher on cpu in fp32, 2 labeled and 4 unlabeled patches of 16x16x16",
        "at most 1 MiB",
        "about 1000 MiB (student 1000 MiB)",
        "-gpu_memory_target",
        "--disable_memory_check",
    ):
        assert part in text
    trainer.settings.memory_check = False
    with pytest.raises(pytest.fail.Exception, match="opened"):
        trainer.on_train_start()


@pytest.mark.parametrize(
    ("room", "bf16", "shares", "expected"),
    [
        (700, True, {"per_patch": 0.2}, "--micro-batch 3 (about 600 MiB)"),
        (500, True, {"per_patch": 0.2}, "--micro-batch 2 (about 400 MiB)"),
        (600, True, {"per_patch": 0.7, "precision": 0.5}, "--precision bf16 (about 500 MiB)"),
        (400, True, {"per_patch": 0.7, "precision": 0.5}, "--micro-batch 1 --precision bf16 (about 350 MiB)"),
        (400, False, {"per_unlabeled": 0.15}, "--set unlabeled_batch_size=2 (about 300 MiB)"),
        (200, False, {"per_patch": 0.5, "per_unlabeled": 0.3},
         "--micro-batch 1 --set unlabeled_batch_size=1 (about 150 MiB)"),
    ],
)  # fmt: skip
def test_the_smallest_change_that_fits_is_named(checked, estimates, monkeypatch, room, bf16, shares, expected):
    trainer = checked(room * MIB)
    monkeypatch.setattr(memory_check, "cpu_has_bf16", lambda: bf16)
    estimates(**shares)
    with pytest.raises(UserError) as refusal:
        memory_check.check_memory(trainer)
    assert refusal.value.fix.startswith(expected)


def test_a_suggested_change_is_estimated_by_a_rehearsal(checked):
    trainer = checked(None)
    changes = Changes(micro_batch=3)  # of 6 patches
    room = rehearse(trainer, changes).total
    assert room < rehearse(trainer).total
    found, estimate = memory_check.smallest_change(trainer, room)
    assert (found, estimate.total) == (changes, room)


def test_ranks_of_one_machine_share_its_memory(checked, estimates):
    trainer = checked(1500 * MIB)
    estimates(per_patch=0.2)
    memory_check.check_memory(trainer)
    trainer.ranks = Ranks(local_size=2)
    with pytest.raises(UserError, match="at most 750 MiB"):
        memory_check.check_memory(trainer)


def test_a_step_that_asks_for_values_is_not_estimated_and_not_stopped(checked, monkeypatch, capsys):
    trainer = checked(MIB)
    monkeypatch.setattr(type(trainer), "supervised_loss", lambda self, step: step.labeled_logits.nonzero().sum())
    memory_check.check_memory(trainer)
    output = capsys.readouterr().out
    assert "memory of a step: cannot be estimated" in output
    assert "nonzero" in output


def test_a_device_that_does_not_tell_is_not_checked(checked, capsys):
    memory_check.check_memory(checked(None))
    assert "memory of a step: not estimated" in capsys.readouterr().out


# ---------------------------------------------------------------------- what stands against micro-batches


def test_batch_norm_is_refused_and_never_suggested(checked, tiny, estimates):
    trainer = checked(500 * MIB)
    unwrap(trainer.network).extra = nn.BatchNorm3d(2)
    estimates(per_patch=0.01, per_unlabeled=0.2)
    with pytest.raises(UserError) as refusal:
        memory_check.check_memory(trainer)
    assert refusal.value.fix.startswith("--set unlabeled_batch_size=2")
    trainer.settings.micro_batch = 1
    with pytest.raises(UserError, match=r"batch normalization mixes .* \(layer extra\)"):
        trainer.on_train_start()


def test_batch_norm_of_a_teacher_mixes_nothing(tiny):
    trainer = tiny().trainer("MeanTeacher")
    trainer.teacher.network.extra = nn.BatchNorm3d(2).requires_grad_(False).eval()
    assert obstacle_to_parts(trainer) is None


def test_dropout_is_refused_where_it_drops(tiny):
    trainer = tiny().trainer("Supervised")
    unwrap(trainer.network).extra = nn.Dropout3d(0.0)
    assert obstacle_to_parts(trainer) is None
    unwrap(trainer.network).extra = nn.Dropout3d(0.1)
    assert "dropout would draw other numbers (layer extra)" in obstacle_to_parts(trainer)


def test_a_hook_on_a_layer_is_refused(tiny):
    trainer = tiny().trainer("Supervised")
    unwrap(trainer.network).encoder.register_forward_hook(lambda *call: None)
    assert "(layer encoder)" in obstacle_to_parts(trainer)


def test_a_training_that_goes_on_is_offered_micro_batches_only(tmp_path, monkeypatch):
    trainer = Tiny().write(tmp_path, monkeypatch).trainer("MeanTeacher")
    torch.use_deterministic_algorithms(False)
    assert {"micro_batch", "unlabeled"} <= memory_check._options(trainer).keys()
    trainer.iteration = 1
    assert memory_check._options(trainer).keys() == {"micro_batch"}
