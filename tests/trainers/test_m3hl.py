"""Checks of the specification of mutual mask mix with features of two levels."""

from __future__ import annotations

import pytest
import torch

from nnssl.errors import UserError
from nnssl.networks.features import bottleneck, last_decoder_stage, max_pooled, total_strides
from nnssl.networks.unwrap import unwrap
from tests.support.unets import KINDS, small_unet

PAIRED = {"labeled_batch": 2, "unlabeled_batch": 2}


@pytest.fixture
def make(build):
    return lambda options=PAIRED, **overrides: build("M3HL", options, **overrides)


def mixed(trainer, batch):
    step = trainer.make_step(batch)
    trainer.prepare_step(step)
    return step


def forwarded(trainer, batch):
    step = mixed(trainer, batch)
    trainer.forward(step)
    return step


def values(module):
    return [value.detach().clone() for value in module.state_dict().values()]


def test_both_mixes_have_the_same_mask_with_exchanged_roles(make):
    data, trainer = make({"labeled_batch": 4, "unlabeled_batch": 4, "channels": 2})
    batch = data.batch(0)
    step = mixed(trainer, batch)
    labeled = step.extra["is_labeled"][0]
    assert labeled.float().mean((1, 2, 3, 4)).tolist() == [0.5] * 4
    assert torch.equal(labeled[0], ~labeled[1])
    assert torch.equal(labeled[2], ~labeled[3])
    assert not torch.equal(labeled[0], labeled[2])
    # every channel comes from the same patch, and pieces of a pair come from the places where they were
    assert torch.equal(step.labeled, torch.where(labeled, batch["data"], batch["unlabeled"]))
    assert torch.equal(step.target[0], batch["target"][0])


def test_the_parts_of_one_pair_give_back_the_labeled_patch(make):
    data, trainer = make()
    batch = data.batch(0)
    for key in ("data", "unlabeled"):
        batch[key] = batch[key][:1].repeat(2, 1, 1, 1, 1)
    step = mixed(trainer, batch)
    labeled = step.extra["is_labeled"][0]
    assert torch.equal(torch.where(labeled[0], step.labeled[0], step.labeled[1]), batch["data"][0])


@pytest.mark.parametrize(("ratio", "whole"), [(0.0, "data"), (1.0, "unlabeled")])
def test_nothing_or_everything_exchanged(make, ratio, whole):
    data, trainer = make()
    trainer.mask_ratio = ratio
    batch = data.batch(0)
    step = mixed(trainer, batch)
    other = "unlabeled" if whole == "data" else "data"
    assert torch.equal(step.labeled[0], batch[whole][0])
    assert torch.equal(step.labeled[1], batch[other][1])


def test_masks_are_exact_at_every_head(make):
    data, trainer = make()
    full, *others = mixed(trainer, data.batch(0)).extra["is_labeled"]
    for mask in others:
        factor = full.shape[-1] // mask.shape[-1]
        assert torch.equal(torch.nn.functional.interpolate(mask.float(), full.shape[2:]).bool(), full)
        assert factor > 1


def test_the_share_of_blocks_can_change_from_step_to_step(make):
    data, trainer = make(mask_ratio_spread=0.2)
    shares = set()
    for seed in range(4):
        torch.manual_seed(seed)
        shares.add(float(mixed(trainer, data.batch(0)).extra["is_labeled"][0][1].float().mean()))
    assert len(shares) > 1
    assert all(0.29 < share < 0.71 for share in shares)


def test_exchanging_mask_and_targets_changes_no_loss(make):
    data, trainer = make()
    step = forwarded(trainer, data.batch(0))
    one, other, mask = step.target, data.batch(5)["target"], step.extra["is_labeled"]

    def loss(inside, outside, mask):
        parts = (inside, mask), (outside, [~m for m in mask])
        return sum(trainer.masked_segmentation_loss(step.heads, target, where) for target, where in parts)

    torch.testing.assert_close(loss(one, other, mask), loss(other, one, [~m for m in mask]))
    separate = trainer.masked_segmentation_loss(step.heads, one, mask)
    separate = separate + trainer.masked_segmentation_loss(step.heads, one, [~m for m in mask])
    torch.testing.assert_close(loss(one, one, mask), separate)


def test_true_labels_pull_twice_as_hard_as_pseudo_labels(make, monkeypatch):
    data, trainer = make(enable_deep_supervision=False)
    step = forwarded(trainer, data.batch(0))
    logits = torch.zeros_like(step.heads[0], requires_grad=True)
    step.heads = [logits]
    step.target = [torch.ones_like(step.target[0])]
    monkeypatch.setattr(trainer, "pseudo_labels", lambda logits: torch.ones_like(step.target[0]))
    trainer.loss.dc.forward = lambda *tensors, **named: tensors[0].sum() * 0
    terms = trainer.unsupervised_loss(step)
    (trainer.supervised_loss(step) + terms["pseudo"]).backward()
    size = logits.grad[:, :1].abs()
    labeled = step.extra["is_labeled"][0]
    torch.testing.assert_close(size[labeled].mean(), 2 * size[~labeled].mean())
    assert size[labeled].std() < 1e-9


def test_features_of_a_mixed_patch_that_is_an_unlabeled_one_agree(make):
    data, trainer = make()
    trainer.mask_ratio = 1.0
    trainer.teacher.update(unwrap(trainer.network), 0.0)
    step = forwarded(trainer, data.batch(0))
    trainer.teacher_logits(step)
    (high, low), (teacher_high, teacher_low) = step.extra["features"], step.extra["teacher_features"]
    assert trainer.high_distance(high[:1], teacher_high[:1]).item() == pytest.approx(0, abs=1e-6)
    assert trainer.low_distance(low[:1], teacher_low[:1]).item() == pytest.approx(0, abs=1e-6)
    assert 0 < trainer.high_distance(high[1:], teacher_high[1:]) <= 2
    assert trainer.low_distance(low[1:], teacher_low[1:]) > 0
    ones = torch.ones(2, 3, 4, 4, 4)
    assert trainer.high_distance(ones, -ones).item() == pytest.approx(2)
    assert trainer.low_distance(ones, -ones).item() == 2


def test_all_four_combinations_count_the_same(make):
    data, trainer = make(feature_weight=0.5)
    step = forwarded(trainer, data.batch(0))
    terms = trainer.unsupervised_loss(step)
    (high, low), (teacher_high, teacher_low) = step.extra["features"], step.extra["teacher_features"]
    pooled = [torch.nn.functional.max_pool3d(feature, 3, 2).flatten(1) for feature in (high, teacher_high)]
    cosines = torch.nn.functional.normalize(pooled[0]) @ torch.nn.functional.normalize(pooled[1]).T
    torch.testing.assert_close(terms["high"], 0.5 * (1 - cosines).mean())
    torch.testing.assert_close(terms["low"], 0.5 * (low[:, None] - teacher_low[None]).abs().mean())
    terms["low"].backward()
    assert all(p.grad is None for p in trainer.teacher.parameters())


def test_teacher_features_are_those_of_the_unmixed_patches(make):
    data, trainer = make()
    batch = data.batch(0)
    step = forwarded(trainer, batch)
    logits = trainer.teacher_logits(step)
    network = trainer.teacher.network
    low = step.extra["teacher_features"][1]
    torch.testing.assert_close(network.decoder.seg_layers[-1](low), trainer.teacher(batch["unlabeled"]))
    torch.testing.assert_close(logits, trainer.teacher(batch["unlabeled"]))
    assert not any(feature.requires_grad for feature in step.extra["teacher_features"])


def test_the_teacher_comes_near_a_resting_student(make):
    _, trainer = make()
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.add_(1.0)
    start = values(trainer.teacher.network)
    for _ in range(3):
        trainer.after_step(None)
    for teacher, before, student in zip(
        values(trainer.teacher.network), start, values(unwrap(trainer.network)), strict=True
    ):
        torch.testing.assert_close(student - teacher, (student - before) * 0.99**3, rtol=1e-4, atol=1e-5)


def test_a_first_phase_exchanges_blocks_of_labeled_patches(make):
    data, trainer = make(pretrain_share=0.5)
    batch = data.batch(0)
    step = mixed(trainer, batch)
    own = (step.labeled == batch["data"]).float().mean((1, 2, 3, 4))
    assert own.tolist() == pytest.approx([0.5, 0.5], abs=0.01)
    assert set(trainer.train_step(batch)) == {"loss", "supervised"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dimensions", [2, 3])
def test_levels_are_found_in_both_architectures(kind, dimensions):
    network = small_unet(kind, dimensions)
    assert total_strides(network) == (4,) * dimensions
    assert bottleneck(network).channels == 8
    assert last_decoder_stage(network).channels == 4


def test_short_axes_are_not_pooled():
    features = torch.randn(1, 2, 2, 7, 5)
    assert max_pooled(features).shape == (1, 2, 2, 3, 2)
    assert torch.equal(max_pooled(features[..., :2, :2]), features[..., :2, :2])
    assert max_pooled(torch.randn(1, 2, 16, 2)).shape == (1, 2, 7, 2)


@pytest.mark.parametrize(
    "setting",
    [
        {"blocks_per_axis": 1},
        {"mask_ratio": 1.0},
        {"mask_ratio": 0.01},
        {"mask_ratio_spread": 0.5},
        {"mask_ratio_spread": -0.1},
        {"feature_weight": -1.0},
    ],
)
def test_unusable_values_are_refused(make, setting):
    with pytest.raises(UserError, match="unusable") as error:
        make(**setting)[1].check_settings()
    assert "--set" in str(error.value)
