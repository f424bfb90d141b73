"""Checks of the EFS-MedSeg specification."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nnssl.errors import UserError
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.requirements import check_requirements
from tests.support.tiny import DEVICE

PAIR = {"labeled_batch": 2}
NOTHING = {"reconstruction_weight": 0.0, "kl_weight": 0.0, "contrast_weight": 0.0, "atlas_augmentation": "none"}


@pytest.fixture
def make(build):
    return lambda options=None, **overrides: build("EFSMedSeg", PAIR | (options or {}), **overrides)


def _forward(trainer: Any, batch: dict[str, Any], progress: float = 1.0) -> Any:
    step = trainer.make_step(batch)
    step.progress = progress
    trainer.forward(step)
    return step


def _gradient(module: torch.nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


def test_defaults_are_those_of_the_specification(make):
    _, trainer = make()
    assert trainer.atlas_augmentation == "regional_switch"
    assert (trainer.min_labeled, trainer.min_labeled_patches) == (2, 2)
    values = trainer.hyperparameter_values()
    assert [values[f"{name}_weight"] for name in ("reconstruction", "kl", "contrast", "dice")] == [1.0, 0.01, 0.01, 1.0]


def test_a_single_labeled_case_is_refused(make):
    _, trainer = make({"labeled": 1})
    with pytest.raises(UserError, match="at least 2 labeled cases"):
        check_requirements(trainer)


def test_without_its_parts_a_step_is_that_of_supervised(make, build):
    data, trainer = make(**NOTHING)
    assert not trainer._modules
    _, reference = build("Supervised", PAIR)
    for seed in range(2):
        ours, theirs = trainer.train_step(data.batch(seed)), reference.train_step(data.batch(seed))
        assert torch.equal(ours["loss"], theirs["loss"])
    pairs = zip(unwrap(trainer.network).parameters(), unwrap(reference.network).parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("setting", "terms"),
    [
        ({"reconstruction_weight": 0.0, "kl_weight": 0.0}, {"contrast"}),
        ({"contrast_weight": 0.0}, {"kl", "reconstruction"}),
        ({"dice_weight": 0.0}, {"kl", "reconstruction", "contrast"}),
    ],
)
def test_ablations_leave_parts_out(make, setting, terms):
    data, trainer = make(**setting)
    assert set(trainer.train_step(data.batch())) == {"loss", "supervised", *terms}
    assert ("running_dice" in trainer._modules) == (terms == {"kl", "reconstruction"})


# ---------------------------------------------------------------------- reconstruction


@pytest.mark.parametrize("setting", [{"dice_weight": 0.0}, {}, {"equal_weights_share": 1.0}])
def test_with_equal_weights_the_reconstruction_is_the_mean_squared_error(make, setting):
    data, trainer = make(**setting)
    step = _forward(trainer, data.batch(), progress=0.5)
    if not setting:
        trainer.running_dice.dice.fill_(0.4)
    loss = trainer.unsupervised_loss(step)["reconstruction"]
    expected = (step.extra["reconstruction"] - step.images).square().mean()
    torch.testing.assert_close(loss, expected)


def test_weights_follow_labels_predictions_and_dice(make):
    data, trainer = make()
    step = _forward(trainer, data.batch(), progress=0.05)
    trainer.running_dice.dice.copy_(torch.tensor([0.9, 0.4]))
    weights = trainer.voxel_weights(step)
    by_class = torch.tensor([1.1, 1.6], device=DEVICE)
    torch.testing.assert_close(weights[:2], by_class[step.target[0].long()])
    torch.testing.assert_close(weights[2:], by_class[step.unlabeled_logits.argmax(1, keepdim=True)])
    error = (torch.randn_like(step.images)).square()
    expected = (error * weights / weights.mean()).mean()
    torch.testing.assert_close(trainer.masked_mean(error, weights), expected)
    step.progress = 0.049
    assert (trainer.voxel_weights(step) == 1).all()


def test_voxels_without_annotation_weigh_1(make):
    data, trainer = make({"ignore": True})
    batch = data.batch()
    batch["target"][0][:, :, :3] = 2
    step = _forward(trainer, batch)
    weights = trainer.voxel_weights(step)
    assert (weights[:2, :, :3] == 1).all()
    assert (weights[:2, :, 3:] == 2).all()
    trainer.after_step(step)
    inside = step.target[0][:, :, 3:]
    predicted = step.labeled_logits.argmax(1, keepdim=True)[:, :, 3:]
    dice = 2 * ((inside == 1) & (predicted == 1)).sum() / ((inside == 1).sum() + (predicted == 1).sum())
    assert trainer.running_dice.dice[1].item() == pytest.approx(0.1 * dice.item(), rel=1e-4)


def test_outside_of_the_body_nothing_is_reconstructed(make):
    data, trainer = make({"masked": True})
    batch = data.batch()
    batch["data"][:, :, :4] = 0
    step = _forward(trainer, batch)
    loss = trainer.unsupervised_loss(step)["reconstruction"]
    weights = trainer.voxel_weights(step)
    assert (weights[:2, :, :4] == 0).all()
    assert (weights[:2, :, 4:] > 0).all()
    error = (step.extra["reconstruction"] - step.images).square()
    torch.testing.assert_close(loss, (error * weights).sum() / weights.sum())


def test_unlabeled_patches_train_the_encoder_and_not_the_decoder_of_the_segmentation(make):
    data, trainer = make(contrast_weight=0.0)
    batch = data.batch()
    step = _forward(trainer, batch)
    labeled = len(step.labeled)
    trainer.voxel_weights = lambda step: (torch.arange(len(step.images)) >= labeled).float().view(-1, 1, 1, 1, 1)
    trainer.unsupervised_loss(step)["reconstruction"].backward()
    network = unwrap(trainer.network)
    assert _gradient(network.encoder) > 0
    assert _gradient(network.decoder.stages) == _gradient(network.decoder.seg_layers) == 0
    assert _gradient(trainer.latent) > 0
    assert _gradient(trainer.image_decoder) > 0


def test_every_step_draws_another_latent_image_and_a_repeated_one_the_same(make):
    data, trainer = make()
    seen = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        step = _forward(trainer, data.batch())
        trainer.unsupervised_loss(step)
        seen.append(step.extra["reconstruction"])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])


def test_the_divergence_sets_in_slowly(make):
    data, trainer = make(kl_rampup_share=0.5)
    losses = []
    for progress in (0.0, 0.25, 0.5, 1.0):
        losses.append(trainer.unsupervised_loss(_forward(trainer, data.batch(), progress))["kl"].item())
    full = losses[-1]
    assert full > 0
    assert losses == pytest.approx([0, full / 2, full, full], rel=1e-4)


def test_the_running_dice_is_saved(make):
    _, trainer = make(num_epochs=1)
    trainer.run_training()
    dice = trainer.running_dice.dice.clone()
    assert (dice > 0).any()
    _, other = make(num_epochs=1)
    other.load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    assert torch.equal(other.running_dice.dice, dice)


# ---------------------------------------------------------------------- contrast


def test_unlabeled_patches_have_prototypes_later(make):
    """Of a single structure all prototypes are positives, which the first weights hardly tell apart."""
    data, trainer = make()
    early, late = (trainer.structure_loss(_forward(trainer, data.batch(), progress)) for progress in (0.19, 0.2))
    assert early.item() == pytest.approx(0, abs=1e-6)
    assert late.item() == pytest.approx(math.log(3), rel=0.05)


def test_without_enough_voxels_there_is_no_contrast(make):
    data, trainer = make(prototype_voxels=10_000)
    step = _forward(trainer, data.batch())
    assert trainer.structure_loss(step).item() == 0


def test_the_contrast_trains_the_decoder_and_the_projector(make):
    data, trainer = make({"classes": 3})
    step = _forward(trainer, data.batch())
    trainer.structure_loss(step).backward()
    network = unwrap(trainer.network)
    assert _gradient(network.decoder.stages[-2]) > 0
    assert _gradient(trainer.projector) > 0
    # what weighs the voxels of unlabeled patches is no part of it
    assert _gradient(network.decoder.seg_layers) == _gradient(network.decoder.stages[-1]) == 0


# ---------------------------------------------------------------------- readings and forms of labels


@pytest.mark.parametrize(
    "setting",
    [
        {"dice_area": "block"},
        {"reconstruct_from": "features+prediction"},
        {"contrast": "global"},
        {"reconstruction_skips": True},
    ],
)
@pytest.mark.parametrize("options", [{"dimensions": 2, "channels": 2, "classes": 3, "ignore": True}, {}])
def test_other_readings(make, options, setting):
    data, trainer = make(options, prototype_voxels=8, **setting)
    step = _forward(trainer, data.batch())
    losses = trainer.unsupervised_loss(step)
    assert all(loss.item() > 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(_gradient(module) > 0 for name, module in trainer._modules.items() if name != "running_dice")
    assert _gradient(unwrap(trainer.network).encoder) > 0
    if setting.get("contrast") == "global":
        assert trainer.projector[0].in_features == 8
    if "reconstruct_from" in setting:
        assert _gradient(unwrap(trainer.network).decoder.stages[-1]) > 0
    if "dice_area" in setting:
        weights = trainer.voxel_weights(step)
        assert (weights[2:] == 1).all()
        assert weights[:2].min() > 1 or options  # random labels are nowhere right
        assert "running_dice" not in trainer._modules


def test_regions_weigh_as_the_worst_of_them(make):
    data, trainer = make({"regions": True, "classes": 3})
    batch = data.batch()
    whole, core = (batch["target"][0] > 0), (batch["target"][0] > 1)
    batch["target"] = [torch.cat([whole, core], 1), torch.cat([whole, core], 1)[..., ::2, ::2, ::2]]
    step = _forward(trainer, batch)
    trainer.running_dice.dice.copy_(torch.tensor([0.8, 0.5]))
    weights = trainer.voxel_weights(step)[:2].cpu()
    torch.testing.assert_close(weights, 1 + 0.2 * (whole & ~core) + 0.5 * core)
    assert trainer.unsupervised_loss(step)["contrast"].item() > 0
    trainer.after_step(step)
    assert (trainer.running_dice.dice.cpu() != torch.tensor([0.8, 0.5])).all()


@pytest.mark.parametrize(
    "setting",
    [
        {"kl_weight": -1.0},
        {"temperature": 0.0},
        {"prototype_voxels": 0},
        {"labeled_contrast_share": 1.5},
        {"contrast": "global", "reconstruction_weight": 0.0},
    ],
)
def test_unusable_settings_are_refused(make, setting):
    with pytest.raises(UserError, match="unusable value"):
        make(**setting)[1].check_settings()


def test_autocast_leaves_similarities_and_divergence_in_float32(make, monkeypatch):
    data, trainer = make()
    trainer.precision = type(trainer.precision)("bf16", DEVICE.type)
    step = _forward(trainer, data.batch())
    mean, log_variance = trainer.latent_image(step)
    assert mean.dtype == log_variance.dtype == torch.float32
    losses = trainer.unsupervised_loss(step)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert step.extra["reconstruction"].dtype == torch.float32
