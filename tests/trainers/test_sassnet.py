"""Checks of the SASSNet specification."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from nnssl.errors import UserError
from nnssl.inference.export import export_model
from nnssl.inference.models import find_model
from nnssl.inference.predictor import Predictor
from nnssl.losses.signed_distance import normalized_signed_distance
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.schedule import update_learning_rates
from tests.support.tiny import DEVICE, Tiny


@pytest.fixture
def make(tmp_path, monkeypatch):
    made = []

    def make(data=None, **overrides):
        data = data or (made[0] if made else Tiny().write(tmp_path, monkeypatch))
        made.append(data)
        return data, data.trainer("SASSNet", **overrides)

    yield make
    torch.use_deterministic_algorithms(False)


def _values(*modules):
    return [value.detach().clone() for module in modules for value in unwrap(module).state_dict().values()]


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _forward(trainer, batch, progress=1.0):
    step = trainer.make_step(batch)
    step.progress = progress
    trainer.forward(step)
    return step


def _with_verdict(trainer, logits):
    """Makes the discriminator answer ``logits`` for every patch."""
    with torch.no_grad():
        trainer.discriminator.classifier.weight.zero_()
        trainer.discriminator.classifier.bias.copy_(torch.tensor(logits))


def test_maps_come_from_the_last_feature_and_are_bounded(make):
    data, trainer = make()
    with torch.no_grad():
        trainer.sdm_head.weight.mul_(1000)
    step = _forward(trainer, data.batch(0))
    assert step.extra["maps"].shape == (3, 1, 16, 16, 16)
    assert step.extra["maps"].abs().max() == 1
    trainer.sdm_loss(step).backward()
    assert next(unwrap(trainer.network).encoder.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "maps"), [({"dimensions": 2, "classes": 4}, 3), ({"regions": True, "classes": 3}, 2)]
)
def test_the_stream_delivers_one_map_per_class_or_region(tmp_path, monkeypatch, make, options, maps):
    data, trainer = make(Tiny(**options, labeled_batch=2).write(tmp_path, monkeypatch))
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    expected = trainer.extra_targets()["signed_distances"]
    distances = batch["extra"]["signed_distances"]
    assert distances.shape == (2, maps, *data.patch)
    assert distances.min() == -1
    assert len(batch["target"]) == 2
    for patch, distance in zip(batch["target"][0], distances, strict=True):
        assert torch.equal(expected(patch), distance)
    assert "extra" not in next(trainer.dataloader_val)
    assert trainer.train_step(batch)["sdm"] > 0


def test_error_of_the_maps(make):
    data, trainer = make()
    batch = data.batch(0)
    step = _forward(trainer, batch)
    expected = normalized_signed_distance(batch["target"][0][0, 0].numpy() == 1)
    difference = step.extra["maps"][0, 0].detach().cpu() - torch.from_numpy(expected)
    assert trainer.sdm_loss(step).item() == pytest.approx(0.3 * difference.square().mean().item(), rel=1e-3)
    step.extra["maps"] = torch.from_numpy(expected).to(DEVICE).expand(3, 1, -1, -1, -1)
    assert trainer.sdm_loss(step).item() < 1e-6


def test_each_step_changes_its_own_network_only(make, monkeypatch):
    data, trainer = make(adversarial_weight=1.0)
    step = _forward(trainer, data.batch(0))
    sum(trainer.unsupervised_loss(step).values()).backward()
    assert all(p.grad is None for p in trainer.discriminator.parameters())
    assert all(p.requires_grad for p in trainer.discriminator.parameters())
    assert trainer.sdm_head.weight.grad.abs().sum() > 0

    segmenter = (trainer.network, trainer.sdm_head)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.discriminator_loss(step).backward()
    assert all(p.grad is None for module in segmenter for p in module.parameters())
    assert all(p.grad is not None for p in trainer.discriminator.parameters())

    seen = []
    real = trainer.ranks.average_gradients
    modules = {"segmenter": segmenter, "discriminator": (trainer.discriminator,)}
    monkeypatch.setattr(
        trainer.ranks,
        "average_gradients",
        lambda parameters: (seen.append({name: _values(*m) for name, m in modules.items()}), real(parameters)),
    )
    trainer.train_step(data.batch(1))
    seen.append({name: _values(*m) for name, m in modules.items()})
    before, between, after = seen
    assert not _equal(before["segmenter"], between["segmenter"])
    assert _equal(before["discriminator"], between["discriminator"])
    assert _equal(between["segmenter"], after["segmenter"])
    assert not _equal(between["discriminator"], after["discriminator"])


def test_without_weight_the_segmenter_is_trained_by_its_two_tasks_alone(make):
    data, trainer = make(adversarial_weight=0.0)
    _, reference = make()
    reference.unsupervised_loss = lambda step: {"sdm": reference.sdm_loss(step)}
    reference.discriminator_loss = lambda step: reference.discriminator.classifier.bias.sum()
    for seed in range(3):
        trainer.train_step(data.batch(seed))
        reference.train_step(data.batch(seed))
    assert _equal(_values(trainer.network, trainer.sdm_head), _values(reference.network, reference.sdm_head))


def test_weight_of_the_adversarial_term(make):
    data, trainer = make()
    _with_verdict(trainer, [3.0, 0.0])
    for progress, weight in ((0.0, 6.738e-5), (1.0, 0.01)):
        step = _forward(trainer, data.batch(0), progress)
        taken_for_unlabeled = math.log1p(math.exp(3.0))
        loss = trainer.unsupervised_loss(step)["adversarial"].item()
        assert loss == pytest.approx(weight * taken_for_unlabeled, rel=1e-3)


def test_the_discriminator_tells_labeled_from_unlabeled(make):
    data, trainer = make()
    step = _forward(trainer, data.batch(0))
    _with_verdict(trainer, [2.0, 0.0])
    expected = (math.log1p(math.exp(2.0)) + math.log1p(math.exp(-2.0))) / 2
    assert trainer.discriminator_loss(step).item() == pytest.approx(expected, rel=1e-5)


def test_the_adversarial_term_looks_at_unlabeled_patches_only(make):
    data, trainer = make(adversarial_weight=1.0)
    batch = data.batch(0)
    other = batch | {"data": batch["data"] * 2 + 1}
    first, second = (trainer.unsupervised_loss(_forward(trainer, b))["adversarial"].item() for b in (batch, other))
    assert first == pytest.approx(second, rel=1e-5)


@pytest.mark.parametrize(("rows", "others_matter"), [("uniform", False), ("all", True)])
def test_rows_that_are_forced_to_show_foreground_are_not_shown(tmp_path, monkeypatch, make, rows, others_matter):
    data = Tiny(labeled_batch=4).write(tmp_path, monkeypatch)
    _, trainer = make(data, discriminator_rows=rows, discriminator_dropout=0.0)
    assert (trainer.labeled_shown, trainer.labeled_shown_by_all) == ((3, 3) if rows == "uniform" else (4, 4))

    def loss(scaled):
        step = _forward(trainer, data.batch(0))
        step.labeled[scaled] *= 3.0
        return trainer.discriminator_loss(step).item()

    none, last, first = loss(slice(0)), loss(3), loss(0)
    assert (none != last) == others_matter
    assert none != first


def test_a_single_labeled_patch_is_uniform_and_shown(make):
    _, trainer = make()
    assert trainer.labeled_shown == 1


def test_unusable_settings_are_refused(make):
    with pytest.raises(UserError, match="forced to show foreground"):
        make(oversample_foreground_percent=1.0)
    _, trainer = make(oversample_foreground_percent=1.0, discriminator_rows="all")
    assert trainer.labeled_shown == 1
    with pytest.raises(UserError, match="discriminator_dropout"):
        make(discriminator_dropout=1.0)[1].check_settings()


def test_the_regional_switch_leaves_no_uniform_row(make):
    with pytest.raises(UserError, match="discriminator_rows=all"):
        make(atlas_augmentation="regional_switch")[1].check_settings()
    make(atlas_augmentation="regional_switch", discriminator_rows="all")[1].check_settings()


def test_the_discriminator_drops_channels_in_its_own_step_only(make):
    data, trainer = make()
    step = _forward(trainer, data.batch(0))
    assert trainer.discriminator_loss(step) != trainer.discriminator_loss(step)
    first, second = (trainer.unsupervised_loss(step)["adversarial"] for _ in range(2))
    assert torch.equal(first, second)


def test_channel_dropout_keeps_the_mean(make):
    _, trainer = make()
    torch.manual_seed(0)
    dropped = trainer.drop_channels(torch.ones(50, 40, 2, 2, 2), 0.25)
    assert torch.equal(dropped, dropped[..., :1, :1, :1].expand_as(dropped))
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_the_learning_rate_of_the_discriminator_stays(make):
    _, trainer = make()
    trainer.current_epoch = 1
    update_learning_rates(trainer)
    assert trainer.optimizer.param_groups[1]["lr"] < 0.01
    optimizer = trainer._optimizers["discriminator"]
    assert optimizer.param_groups[0]["lr"] == 1e-4
    assert optimizer.defaults["betas"] == (0.9, 0.99)
    assert trainer.optimizer.param_groups[1]["params"][0] is trainer.sdm_head.weight


def test_the_maps_are_learned_before_the_main_phase_and_the_discriminator_rests(make):
    data, trainer = make(pretrain_share=0.5)
    before = _values(trainer.discriminator)
    assert set(trainer.train_step(data.batch(0))) == {"loss", "supervised", "sdm"}
    assert _equal(before, _values(trainer.discriminator))


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_cross_entropy_of_voxels_can_be_left_out(make, deep_supervision):
    data, trainer = make(voxel_cross_entropy=False, enable_deep_supervision=deep_supervision)
    _, both = make(enable_deep_supervision=deep_supervision)
    step = _forward(trainer, data.batch(0))
    dice, sum_of_both = trainer.supervised_loss(step), both.supervised_loss(step)
    entropy = both.over_heads(both.cross_entropy, step.labeled_heads, step.target)
    assert (dice + entropy).item() == pytest.approx(sum_of_both.item(), rel=1e-4)


def test_distances_in_millimeters(make):
    _, trainer = make(distance_unit="mm")
    trainer.configuration_manager.configuration["spacing"] = [3.0, 1.0, 1.0]
    assert trainer.extra_targets()["signed_distances"].sampling == (3.0, 1.0, 1.0)
    assert make()[1].extra_targets()["signed_distances"].sampling is None


def test_the_exported_network_is_the_planned_one(make, tmp_path):
    data, trainer = make(num_epochs=1)
    trainer.run_training()
    assert trainer.deployed_network() is unwrap(trainer.network)
    export_model(find_model(data.base.name), tmp_path / "out")
    content = torch.load(tmp_path / "out" / "fold_all" / "checkpoint_final.pth", weights_only=True)
    assert content["trainer_name"] == "nnUNetTrainer"
    weights = unwrap(trainer.network).state_dict()
    assert content["network_weights"].keys() == weights.keys()
    assert all(torch.equal(value.cpu(), weights[name].cpu()) for name, value in content["network_weights"].items())
    ours = Predictor(device=torch.device("cpu"), precision="fp32", memory_format="contiguous", allow_tqdm=False)
    ours.initialize_from_model(find_model(data.base.name))
    network = unwrap(trainer.network).cpu()
    network.decoder.deep_supervision = False
    images = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours.network(images), network(images), rtol=1e-4, atol=1e-5)
    assert Path(trainer.output_folder, "checkpoint_final.pth").is_file()
