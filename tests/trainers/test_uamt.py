"""Checks of the specification of UA-MT."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import brentq

from nnssl.errors import UserError
from nnssl.losses.schedules import sigmoid_rampup
from nnssl.networks.unwrap import unwrap
from tests.support.tiny import Tiny


@pytest.fixture
def make(build):
    return lambda name="UAMT", **settings: build(name, **settings)


def _step(trainer, batch, progress=0.0):
    step = trainer.make_step(batch)
    step.progress = progress
    trainer.forward(step)
    return step


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_uniform_mean_is_masked_until_the_end(classes, make):
    _, trainer = make()
    uniform = torch.full((1, classes, 4, 4, 4), 1 / classes)
    for progress in (0.0, 0.3, 0.9, 0.999):
        assert not trainer.certain(uniform, progress).any()
    certain = torch.zeros(1, classes, 4, 4, 4)
    certain[:, 0] = 1
    assert trainer.certain(certain, 0.0).all()
    assert trainer.certain(certain, 0.0).shape == (1, 1, 4, 4, 4)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_threshold_rises_from_the_published_start_to_the_largest_entropy(classes, make):
    _, trainer = make()
    assert 0.75 + 0.25 * sigmoid_rampup(0.0) == pytest.approx(0.75168, abs=1e-5)
    for progress, share in ((0.0, 0.75168), (1.0, 1.0)):
        below = _mean_with_entropy(classes, (share - 1e-3) * math.log(classes))
        assert trainer.certain(below, progress).item()
        if share < 1:
            above = _mean_with_entropy(classes, (share + 1e-3) * math.log(classes))
            assert not trainer.certain(above, progress).item()


def _mean_with_entropy(classes: int, entropy: float) -> torch.Tensor:
    """``(1, K, 1, 1, 1)``: one class with p, the others with equal parts of the rest."""

    def excess(p: float) -> float:
        rest = (1 - p) / (classes - 1)
        return -p * math.log(p) - (1 - p) * math.log(rest) - entropy

    p = brentq(excess, 1 / classes + 1e-9, 1 - 1e-12)
    values = torch.full((classes,), (1 - p) / (classes - 1), dtype=torch.float64)
    values[0] = p
    return values.view(1, -1, 1, 1, 1)


def test_each_region_is_certain_on_its_own(make):
    _, trainer = make(options={"regions": True, "classes": 3})
    mean = torch.tensor([0.5, 0.9, 0.99]).view(1, 3, 1, 1, 1)
    # 0.9 has a binary entropy of 0.33, three quarters of ln 2 are 0.52, of ln 3 would be 0.82
    assert trainer.certain(mean, 0.0).flatten().tolist() == [False, True, True]
    close = torch.tensor([0.75, 0.9, 0.99]).view(1, 3, 1, 1, 1)  # 0.56
    assert trainer.certain(close, 0.0).flatten().tolist() == [False, True, True]


def test_without_a_certain_voxel_the_term_is_zero(make):
    data, trainer = make()
    with torch.no_grad():
        for p in trainer.teacher.parameters():
            p.zero_()
    step = _step(trainer, data.batch())
    term = trainer.unsupervised_loss(step)["consistency"]
    assert term.item() == 0
    term.backward()
    gradients = [p.grad for p in unwrap(trainer.network).parameters() if p.grad is not None]
    assert gradients
    assert all(bool((g == 0).all()) for g in gradients)


def test_one_undisturbed_pass_with_all_voxels_certain_is_the_mean_teacher(make):
    data, trainer = make(teacher_passes=1, dropout_rate=0.0, noise_std=0.0)
    _, reference = make("MeanTeacher", noise_std=0.0)
    for one in (trainer, reference):
        with torch.no_grad():
            one.teacher.network.decoder.seg_layers[-1].bias[0] += 5
    batch = data.batch()
    assert trainer.certain(trainer.teacher_probabilities(batch["unlabeled"]), 1.0).all()
    terms = [t.unsupervised_loss(_step(t, batch, progress=1.0))["consistency"] for t in (trainer, reference)]
    assert terms[0].item() == pytest.approx(terms[1].item(), rel=1e-5)
    assert terms[0] > 0


@pytest.mark.parametrize("area", [1, 8, 16])
def test_area_of_the_mask_does_not_scale_a_constant_error(area, make, monkeypatch):
    data, trainer = make(options={"classes": 3}, consistency_weight=1.0)
    step = _step(trainer, data.batch(), progress=1.0)
    target = trainer.probabilities(step.unlabeled_logits).detach() + 0.3
    monkeypatch.setattr(trainer, "teacher_probabilities", lambda images: target)
    mask = (torch.arange(16) < area).expand(2, 1, 16, 16, 16)
    monkeypatch.setattr(trainer, "certain", lambda mean, progress: mask)
    assert trainer.unsupervised_loss(step)["consistency"].item() == pytest.approx(0.09, rel=1e-4)


def test_only_certain_voxels_are_compared(make, monkeypatch):
    data, trainer = make()
    step = _step(trainer, data.batch())
    target = trainer.probabilities(step.unlabeled_logits).detach()
    target[..., :8] += 0.3
    monkeypatch.setattr(trainer, "teacher_probabilities", lambda images: target)
    mask = (torch.arange(16) >= 8).expand(2, 1, 16, 16, 16)
    monkeypatch.setattr(trainer, "certain", lambda mean, progress: mask)
    assert trainer.unsupervised_loss(step)["consistency"].item() == 0


def test_uncertainty_is_that_of_the_mean_of_disturbed_passes(make, monkeypatch):
    data, trainer = make(teacher_passes=3)
    passes, means = [], []
    real_pass, real_mask = trainer.teacher_probabilities, trainer.certain

    def one_pass(images):
        passes.append(real_pass(images))
        return passes[-1]

    def mask(mean, progress):
        means.append(mean)
        return real_mask(mean, progress)

    monkeypatch.setattr(trainer, "teacher_probabilities", one_pass)
    monkeypatch.setattr(trainer, "certain", mask)
    trainer.unsupervised_loss(_step(trainer, data.batch()))
    assert len(passes) == 4
    assert all(not torch.equal(passes[0], other) for other in passes[1:])
    torch.testing.assert_close(means[0], torch.stack(passes[1:]).mean(0))
    assert means[0].dtype == torch.float32


def test_each_region_has_its_own_mask(make):
    data, trainer = make(options={"regions": True, "classes": 3}, teacher_passes=1)
    mean = torch.tensor([0.5, 0.99]).reshape(1, 2, 1, 1, 1)
    assert trainer.certain(mean, 0.5).flatten().tolist() == [False, True]
    assert trainer.train_step(data.batch() | _region_targets(data))["consistency"].isfinite()


def _region_targets(data):
    return {"target": [torch.zeros(1, 2, *(edge,) * 3, dtype=torch.bool) for edge in (16, 8)]}


def test_channels_are_dropped_in_both_networks_while_training_only(make):
    data, trainer = make()
    batch = data.batch()
    _, reference = make("MeanTeacher")
    first, second = (_step(trainer, batch).heads for _ in range(2))
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    images = trainer.make_step(batch).unlabeled
    assert not torch.equal(trainer.teacher_probabilities(images), trainer.teacher_probabilities(images))
    with torch.no_grad():
        expected = reference.heads(reference.deployed_network(), images)
        for _ in range(2):
            found = trainer.heads(trainer.deployed_network(), images)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert trainer.deployed_network().state_dict().keys() == reference.deployed_network().state_dict().keys()
    assert trainer.teacher.state_dict().keys() == reference.teacher.state_dict().keys()


def test_dropped_channels_differ_between_patches_and_keep_the_expectation(make):
    _, trainer = make()
    layers = trainer.dropout_layers(trainer.network)
    with trainer.dropout(trainer.network, 50, 50):
        factors = [layer.module.channel_factors for layer in layers]
    assert [tuple(f.shape) for f in factors] == [(100, 8), (100, 4)]
    for f in factors:
        assert f.unique().tolist() == [0, 2]
        assert f.mean().item() == pytest.approx(1, abs=0.15)
        assert len(f.unique(dim=0)) > 10


def test_noise_is_the_only_disturbance_without_dropout(make):
    data, trainer = make(dropout_rate=0.0, noise_std=0.0)
    batch = data.batch()
    first, second = (_step(trainer, batch).heads for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert trainer.dropout_layers(trainer.network) == ()


def test_a_phase_before_the_main_one_drops_channels_too(make):
    data, trainer = make(pretrain_share=0.5)
    for seed in range(4):
        losses = trainer.train_step(data.batch(seed))
    assert losses.keys() == {"loss", "supervised", "consistency"}


def test_channels_are_dropped_in_reduced_precision_and_any_layout(tmp_path, monkeypatch):
    from nnssl.trainers.engine.run_settings import RunSettings

    data = Tiny(dimensions=2).write(tmp_path, monkeypatch)
    for layout in ("contiguous", "channels_last"):
        trainer = data.bare_trainer("UAMT")
        trainer.configure({"num_epochs": 1}, RunSettings(seed=0, precision="bf16", memory_format=layout))
        trainer.initialize()
        losses = trainer.train_step(data.batch())
        assert all(value.isfinite() and value.dtype == torch.float32 for value in losses.values())


@pytest.mark.parametrize("setting", [{"teacher_passes": 0}, {"dropout_rate": 1.0}, {"dropout_rate": -0.5}])
def test_unusable_settings_are_refused(setting, make):
    with pytest.raises(UserError, match=next(iter(setting))):
        make(**setting)[1].check_settings()
