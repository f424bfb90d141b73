"""Checks of the specification of TCSM; the transforms themselves are checked in tests/augmentation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnssl.augmentation.symmetries import Symmetry
from nnssl.errors import UserError
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.distributed import Ranks
from nnssl.trainers.engine.state import seed_everything
from tests.support.tiny import Tiny


@pytest.fixture
def make(build):
    return lambda name="TCSM", **settings: build(name, **settings)


def _term(trainer, batch, progress=1.0):
    step = trainer.make_step(batch)
    step.progress = progress
    trainer.forward(step)
    seed_everything(5)
    return trainer.unsupervised_loss(step)["consistency"]


def _pointwise(trainer) -> None:
    """Replaces student and teacher by a network that sees one voxel at a time, hence is equivariant."""
    seed_everything(0)
    network = nn.Sequential(nn.Conv3d(1, 4, 1), nn.Tanh(), nn.Conv3d(4, 2, 1))
    trainer.network = trainer.teacher.network = network


def test_loss_of_an_equivariant_network_is_zero(make):
    data, trainer = make(noise_std=0.0, options={"unlabeled_batch": 6})
    _pointwise(trainer)
    assert _term(trainer, data.batch()).item() == pytest.approx(0, abs=1e-12)


def test_loss_without_the_way_back_is_not(make, monkeypatch):
    data, trainer = make(noise_std=0.0, options={"unlabeled_batch": 6})
    _pointwise(trainer)
    monkeypatch.setattr(Symmetry, "undo", lambda self, patch: patch)
    assert _term(trainer, data.batch()) > 1e-4


def test_loss_of_a_network_that_sees_neighbors_is_not_zero(make):
    data, trainer = make(noise_std=0.0)
    trainer.teacher.update(unwrap(trainer.network), 0.0)
    assert _term(trainer, data.batch()) > 1e-6


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_identity_on_unlabeled_patches_is_the_mean_teacher(noise, make):
    data, trainer = make(noise_std=noise, consistency_on="unlabeled")
    _, reference = make("MeanTeacher", noise_std=noise)
    trainer.group = trainer.group[:1]
    assert trainer.group == [Symmetry((0, 1, 2))]
    for one in (trainer, reference):
        with torch.no_grad():
            for p in one.teacher.parameters():
                p.mul_(0.5)
    terms = [_term(one, data.batch(), progress=0.5) for one in (trainer, reference)]
    assert terms[0].item() == pytest.approx(terms[1].item(), rel=1e-6)
    assert terms[0] > 0


@pytest.mark.parametrize("scaling", [0.0, 0.1])
def test_gradient_reaches_the_student_and_no_teacher(scaling, make):
    data, trainer = make(scaling=scaling)
    _term(trainer, data.batch()).backward()
    gradients = [p.grad for p in unwrap(trainer.network).parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in gradients) > 0
    assert all(p.grad is None for p in trainer.teacher.parameters())


def test_transforms_differ_between_patches_and_steps(make):
    _, trainer = make()
    assert len(trainer.group) == 48
    drawn = [trainer.draw_symmetries(8) for _ in range(2)]
    assert drawn[0] != drawn[1]
    assert all(len(set(one)) > 4 for one in drawn)


def test_every_patch_is_shown_to_the_teacher_in_its_own_orientation(make, monkeypatch):
    data, trainer = make(noise_std=0.0)
    seen = []
    real = trainer.teacher_probabilities
    monkeypatch.setattr(trainer, "teacher_probabilities", lambda images: (seen.append(images), real(images))[1])
    turn, flip = Symmetry((0, 2, 1)), Symmetry((0, 1, 2), (0,))
    monkeypatch.setattr(trainer, "draw_symmetries", lambda count: [turn] if count == 1 else [flip, turn])
    batch = data.batch()
    _term(trainer, batch)
    labeled, unlabeled = batch["data"], batch["unlabeled"]
    expected = [labeled[0].transpose(2, 3), unlabeled[0].flip(1), unlabeled[1].transpose(2, 3)]
    assert all(torch.equal(a, b) for a, b in zip(seen[0], expected, strict=True))


def test_labeled_patches_count_unless_switched_off(make):
    data, trainer = make(noise_std=0.0)
    _, without = make(noise_std=0.0, consistency_on="unlabeled")
    batch = data.batch()
    other = batch | {"data": batch["data"] * 2 + 1}
    assert _term(trainer, batch).item() != pytest.approx(_term(trainer, other).item(), rel=1e-3)
    assert _term(without, batch).item() == pytest.approx(_term(without, other).item(), rel=1e-5)


def test_ranks_draw_what_one_process_draws(make):
    _, trainer = make()
    seed_everything(3)
    whole = trainer.draw_symmetries(6)
    shares = []
    for rank in range(2):
        trainer.ranks = Ranks(rank, 2, store=torch.distributed.HashStore())
        seed_everything(3)
        shares += trainer.draw_symmetries(3)
    assert shares == whole


def test_axes_that_the_run_does_not_mirror_are_left_alone(make):
    _, trainer = make(mirror_axes=(1, 2))
    assert len(trainer.group) == 8
    assert all(s.order[0] == 0 and 0 not in s.flipped for s in trainer.group)


def test_spacing_and_patch_of_the_plan_decide_about_turns(tmp_path, monkeypatch):
    data = Tiny().write(tmp_path, monkeypatch)
    trainer = data.bare_trainer("TCSM")
    trainer.configuration_manager.configuration["spacing"] = [3.0, 1.0, 1.0]
    trainer.initialize()
    assert {s.order for s in trainer.group} == {(0, 1, 2), (0, 2, 1)}
    assert len(trainer.group) == 16


def test_a_square_in_2d_has_eight_symmetries(make):
    _, trainer = make(options={"dimensions": 2})
    assert len(trainer.group) == 8


def test_a_run_without_any_transform_is_refused(make):
    with pytest.raises(UserError, match="no transform"):
        make(mirror_axes=())
    _, trainer = make(mirror_axes=(), scaling=0.1)
    assert trainer.group == [Symmetry((0, 1, 2))]


@pytest.mark.parametrize("scaling", [-0.1, 1.0])
def test_unusable_scaling_is_refused(scaling, make):
    with pytest.raises(UserError, match="scaling"):
        make(scaling=scaling)[1].check_settings()


def test_scaling_compares_what_stayed_in_the_patch(make, monkeypatch):
    """Patches that are linear in space are resized without error, so that only the lost rim could differ."""
    data, trainer = make(noise_std=0.0, scaling=0.1, consistency_weight=1.0)
    network = nn.Conv3d(1, 2, 1, bias=False)
    trainer.network = trainer.teacher.network = network
    # probabilities that are linear in the image, for softmax would bend them
    monkeypatch.setattr(trainer, "probabilities", lambda logits: logits)
    ramp = torch.linspace(-1, 1, 16).expand(1, 16, 16, 16)
    batch = data.batch() | {"data": ramp[None], "unlabeled": torch.stack([ramp, ramp.transpose(1, 3)])}
    inside = _term(trainer, batch).item()
    monkeypatch.setattr("nnssl.trainers.tcsm.resizing_keeps", lambda shape, factors: torch.ones(3, 1, *shape))
    assert inside < 1e-6 < 1e-4 < _term(trainer, batch).item()


def test_scaling_works_in_2d_and_changes_the_view(make, monkeypatch):
    data, trainer = make(options={"dimensions": 2}, scaling=0.1, noise_std=0.0)
    trainer.group = trainer.group[:1]
    seen = []
    real = trainer.teacher_probabilities
    monkeypatch.setattr(trainer, "teacher_probabilities", lambda images: (seen.append(images), real(images))[1])
    batch = data.batch()
    assert _term(trainer, batch).isfinite()
    assert not torch.allclose(seen[0][1:], batch["unlabeled"], atol=1e-3)
