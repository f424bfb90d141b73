from __future__ import annotations

import pytest
import torch
from torch import nn

from nnssl.networks.ema import EMATeacher


def _student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.InstanceNorm3d(2, affine=True), nn.Conv3d(2, 2, 1))


def _values(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def _change(module: nn.Module) -> None:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)


def test_decay_one_freezes_and_decay_zero_copies():
    student = _student()
    teacher = EMATeacher(student)
    before = _values(teacher)
    _change(student)
    teacher.update(student, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, _values(teacher), strict=True))
    teacher.update(student, 0.0)
    assert all(torch.allclose(a, b) for a, b in zip(_values(student), _values(teacher), strict=True))


def test_average_of_known_weights():
    student = _student()
    teacher = EMATeacher(student)
    before = _values(teacher)
    _change(student)
    teacher.update(student, 0.75)
    assert all(torch.allclose(b + 0.25, a) for b, a in zip(before, _values(teacher), strict=True))


def test_warmup_gives_the_mean_of_all_students():
    student = nn.Linear(1, 1, bias=False)
    teacher = EMATeacher(student)
    for t, weight in enumerate([1.0, 4.0, 7.0]):
        nn.init.constant_(student.weight, weight)
        teacher.update(student, min(1 - 1 / (t + 1), 0.99))
    assert teacher.network.weight.item() == pytest.approx(4.0)


def test_shares_no_memory_with_the_student():
    student = _student()
    teacher = EMATeacher(student)
    before = _values(teacher)
    _change(student)
    assert all(torch.equal(a, b) for a, b in zip(before, _values(teacher), strict=True))


def test_builds_no_graph_and_stays_in_evaluation_mode():
    teacher = EMATeacher(_student())
    teacher.train()
    assert not teacher.network.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(torch.randn(1, 1, 5, 5, 5, requires_grad=True)).requires_grad


def test_copies_buffers():
    student = nn.BatchNorm1d(2)
    teacher = EMATeacher(student)
    student(torch.randn(8, 2) + 3)
    teacher.update(student, 0.9)
    assert torch.equal(teacher.network.running_mean, student.running_mean)
    assert teacher.network.num_batches_tracked == student.num_batches_tracked


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_refuses_impossible_decay(decay):
    student = _student()
    with pytest.raises(ValueError, match="between 0 and 1"):
        EMATeacher(student).update(student, decay)
