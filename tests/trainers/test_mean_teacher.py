"""Checks of the mean teacher specification."""

from __future__ import annotations

import pytest
import torch

from nnssl.networks.unwrap import unwrap
from tests.support.tiny import Tiny


@pytest.fixture
def make(tmp_path, monkeypatch):
    data = Tiny().write(tmp_path, monkeypatch)
    yield lambda **overrides: (data, data.trainer("MeanTeacher", **overrides))
    torch.use_deterministic_algorithms(False)


def _term(trainer, batch, progress=None):
    step = trainer.make_step(batch)
    if progress is not None:
        step.progress = progress
    trainer.forward(step)
    return trainer.unsupervised_loss(step)["consistency"]


def _values(module):
    return [p.detach().clone() for p in module.parameters()]


def test_teacher_with_decay_zero_is_the_student(make):
    data, trainer = make(ema_decay=0.0)
    for seed in range(2):
        trainer.train_step(data.batch(seed))
    pairs = zip(_values(trainer.teacher), _values(unwrap(trainer.network)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_first_update_copies_the_student_and_later_ones_average(make):
    data, trainer = make()
    trainer.train_step(data.batch(0))
    first = _values(unwrap(trainer.network))
    assert all(torch.equal(a, b) for a, b in zip(_values(trainer.teacher), first, strict=True))
    trainer.train_step(data.batch(1))
    second = _values(unwrap(trainer.network))
    means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    assert all(torch.allclose(a, b) for a, b in zip(_values(trainer.teacher), means, strict=True))


def test_consistency_is_zero_for_the_same_network_without_noise(make):
    data, trainer = make(noise_std=0.0)
    # teacher and student see batches of different size, which convolutions round differently
    assert _term(trainer, data.batch(0)).item() == pytest.approx(0, abs=1e-10)


def test_noise_makes_the_consistency_positive(make):
    data, trainer = make()
    assert _term(trainer, data.batch(0)) > 1e-8


def test_noise_is_clipped(make):
    _, trainer = make()
    noise = trainer.with_noise(torch.zeros(4, 1, 16, 16, 16))
    assert noise.abs().max() == pytest.approx(0.2)
    assert noise.std().item() == pytest.approx(0.0957, abs=0.003)


def test_weight_ramps_from_the_published_start_to_its_end(make):
    data, trainer = make(noise_std=0.0)
    with torch.no_grad():
        for p in trainer.teacher.parameters():
            p.mul_(0.5)
    batch = data.batch(0)
    start, end = _term(trainer, batch, progress=0.0), _term(trainer, batch, progress=1.0)
    assert (start / end).item() == pytest.approx(0.006738, rel=1e-3)
    step = trainer.make_step(batch)
    step.progress = 1.0
    trainer.forward(step)
    difference = step.unlabeled_logits.softmax(1) - trainer.teacher(step.unlabeled).softmax(1)
    assert end.item() == pytest.approx(0.1 * difference.square().mean().item(), rel=1e-4)


def test_labeled_patches_do_not_enter_the_consistency(make):
    data, trainer = make(noise_std=0.0)
    with torch.no_grad():
        for p in trainer.teacher.parameters():
            p.mul_(0.5)
    batch = data.batch(0)
    other = batch | {"data": batch["data"] * 2 + 1}
    assert _term(trainer, batch).item() == pytest.approx(_term(trainer, other).item(), rel=1e-5)


def test_the_deployed_network_can_be_the_teacher(make):
    data, trainer = make(deploy="teacher")
    trainer.train_step(data.batch(0))
    assert trainer.deployed_network() is trainer.teacher.network
    _, other = make()
    assert other.deployed_network() is unwrap(other.network)


def test_the_student_may_see_a_stronger_view(tmp_path, monkeypatch):
    tiny = Tiny(masked=True).write(tmp_path, monkeypatch)
    trainer = tiny.trainer("MeanTeacher", student_view="strong", noise_std=0.0)
    torch.use_deterministic_algorithms(False)
    batch = tiny.batch()
    batch["unlabeled"][:, :, :4] = 0
    step = trainer.make_step(batch)
    weak = step.unlabeled.clone()
    trainer.prepare_step(step)
    assert torch.equal(trainer.teacher_view(step), weak)
    assert (step.unlabeled[:, :, 4:] != weak[:, :, 4:]).float().mean() > 0.5
    # the outside of the body stays what it was
    assert step.unlabeled[:, :, :4].abs().max() == 0
    seen = []
    monkeypatch.setattr(trainer, "teacher_probabilities", lambda images: seen.append(images) or torch.zeros(1))
    trainer.forward(step)
    with pytest.raises(ValueError, match="shapes differ"):
        trainer.unsupervised_loss(step)
    assert torch.equal(seen[0], weak)
