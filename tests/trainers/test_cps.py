"""Checks of the specification of cross pseudo supervision, and of the deployed mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnssl.errors import UserError
from nnssl.inference.checkpoint import read_model_checkpoint
from nnssl.inference.export import export_model
from nnssl.inference.models import find_model
from nnssl.inference.predictor import Predictor
from nnssl.networks.unwrap import deep_supervision, unwrap
from nnssl.trainers.engine.checkpoint import save
from nnssl.trainers.engine.run_settings import RunSettings
from tests.support.tiny import DEVICE, Tiny

SECOND = ("second_supervised", "second_cross")


@pytest.fixture
def make(tmp_path, monkeypatch):
    data = Tiny().write(tmp_path, monkeypatch)
    yield lambda name="CPS", **overrides: (data, data.trainer(name, **overrides))
    torch.use_deterministic_algorithms(False)


def _values(module):
    return [value.detach().clone() for value in unwrap(module).state_dict().values()]


def _equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(_values(a), _values(b), strict=True))


def _terms(trainer, batch, progress=1.0):
    step = trainer.make_step(batch)
    step.progress = progress
    trainer.forward(step)
    return {"supervised": trainer.supervised_loss(step), **trainer.unsupervised_loss(step)}


def test_the_networks_start_from_different_weights(make):
    _, trainer = make()
    assert not _equal(trainer.network, trainer.second)


def test_identical_networks_stay_identical(make):
    data, trainer = make(cross_weight=1.0)
    trainer.second.load_state_dict(unwrap(trainer.network).state_dict())
    before = _values(trainer.second)
    for seed in range(3):
        trainer.train_step(data.batch(seed))
    assert _equal(trainer.network, trainer.second)
    assert not all(torch.equal(a, b) for a, b in zip(before, _values(trainer.second), strict=True))


@pytest.mark.parametrize("name", ["supervised", "cross", *SECOND])
def test_each_loss_trains_one_network(make, name):
    data, trainer = make()
    _terms(trainer, data.batch(0))[name].backward()
    own, other = (trainer.second, trainer.network) if name in SECOND else (trainer.network, trainer.second)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in own.parameters())
    assert all(p.grad is None for p in other.parameters())


def test_without_the_cross_term_both_are_supervised_runs(make):
    data, trainer = make(cross_weight=0.0)
    second = {key: value.clone() for key, value in trainer.second.state_dict().items()}
    _, first_alone = make("Supervised")
    _, second_alone = make("Supervised")
    unwrap(second_alone.network).load_state_dict(second)
    for seed in range(3):
        for one in (trainer, first_alone, second_alone):
            one.train_step(data.batch(seed))
    assert _equal(trainer.network, first_alone.network)
    assert _equal(trainer.second, second_alone.network)


def test_the_cross_term_vanishes_only_where_both_are_certain_and_agree(make):
    data, trainer = make(cross_weight=1.0)
    step = trainer.make_step(data.batch(0))
    shape = (3, 2, *data.patch)
    certain = torch.zeros(shape, device=DEVICE)
    certain[:, 1] = 100.0

    def cross(first, second):
        step.heads, step.extra["second_heads"] = [first, first], [second, second]
        step.progress = 1.0
        trainer.supervised_loss = trainer.second_supervised_loss = lambda step: torch.zeros(())
        terms = trainer.unsupervised_loss(step)
        return [terms["cross"].item(), terms["second_cross"].item()]

    assert cross(certain, certain) == [0, 0]
    assert cross(certain, certain.flip(1)) == pytest.approx([100, 100])
    unsure, zero = certain / 100, 0.0
    expected = torch.log1p(torch.tensor(-1.0).exp()).item()
    assert cross(unsure, certain) == pytest.approx([expected, zero])


def test_swapped_networks_swap_the_losses(make):
    data, trainer = make()
    before = _terms(trainer, data.batch(0))
    first = {key: value.clone() for key, value in unwrap(trainer.network).state_dict().items()}
    unwrap(trainer.network).load_state_dict(trainer.second.state_dict())
    trainer.second.load_state_dict(first)
    after = _terms(trainer, data.batch(0))
    for one, other in (("supervised", "second_supervised"), ("cross", "second_cross")):
        assert before[one].item() != before[other].item()
        assert after[one].item() == before[other].item()
        assert after[other].item() == before[one].item()


def test_weight_of_the_cross_term(make):
    data, trainer = make()
    start, end = (_terms(trainer, data.batch(0), progress)["cross"].item() for progress in (0.0, 1.0))
    assert start / end == pytest.approx(0.006738, rel=1e-3)
    step = trainer.make_step(data.batch(0))
    trainer.forward(step)
    labels = step.extra["second_heads"][0][1:].argmax(1)
    expected = 0.1 * torch.nn.functional.cross_entropy(step.unlabeled_logits, labels)
    assert end == pytest.approx(expected.item(), rel=1e-5)


def test_the_original_weighs_all_patches_without_ramp(make):
    data, trainer = make(cross_weight=1.5, cross_ramp=False, cross_data="all")
    step = trainer.make_step(data.batch(0))
    trainer.forward(step)
    labels = step.extra["second_heads"][0].argmax(1)
    expected = 1.5 * torch.nn.functional.cross_entropy(step.heads[0], labels)
    assert _terms(trainer, data.batch(0), 0.0)["cross"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_gradients_are_clipped_for_each_network(make):
    data, trainer = make(gradient_clipping=1e-3)
    trainer.train_step(data.batch(0))
    for module in (trainer.network, trainer.second):
        norm = torch.stack([p.grad.square().sum() for p in module.parameters() if p.grad is not None]).sum().sqrt()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_both_networks_train_before_the_main_phase(make):
    data, trainer = make(pretrain_share=0.5)
    before = _values(trainer.second)
    losses = trainer.train_step(data.batch(0))
    assert set(losses) == {"loss", "supervised", "second_supervised"}
    assert not all(torch.equal(a, b) for a, b in zip(before, _values(trainer.second), strict=True))


def test_pretrained_weights_go_into_both_networks(make):
    data, trainer = make("Supervised")
    file = Path(trainer.output_folder, "pretrained.pth")
    file.parent.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(str(file))
    cps = data.bare_trainer("CPS")
    cps.configure({}, RunSettings(seed=1, pretrained_weights=str(file)))
    cps.initialize()
    pairs = zip(unwrap(cps.network).state_dict().items(), cps.second.state_dict().items(), strict=True)
    differing = {name for (name, first), (_, second) in pairs if not torch.equal(first, second)}
    assert differing
    assert all(".seg_layers." in name for name in differing)


@pytest.mark.parametrize("regions", [False, True])
def test_the_mean_of_both_is_validated_saved_and_predicts(tmp_path, monkeypatch, regions):
    tiny = Tiny(regions=regions, classes=3 if regions else 2).write(tmp_path, monkeypatch)
    trainer = tiny.trainer("CPS", deploy="mean", num_epochs=1)
    trainer.run_training()
    assert trainer.history.rows[-1]["val_loss"] < float("inf")
    deployed = trainer.deployed_network()
    images = torch.randn(1, 1, 16, 16, 16, device=DEVICE)
    with torch.no_grad(), deep_supervision(deployed, False):
        singles = [trainer.probabilities(network(images)) for network in (unwrap(trainer.network), trainer.second)]
        torch.testing.assert_close(trainer.probabilities(deployed(images)), sum(singles) / 2)

    model = find_model(tiny.base.name)
    ours = Predictor(device=torch.device("cpu"), precision="fp32", allow_tqdm=False)
    ours.initialize_from_model(model)
    saved, mine = ours.network.state_dict(), deployed.state_dict()
    assert saved.keys() == mine.keys()
    assert all(torch.equal(saved[key], mine[key].cpu()) for key in saved)
    logits = ours.predict_logits_from_preprocessed_data(torch.randn(1, 20, 20, 20))
    assert logits.shape == (2, 20, 20, 20)
    with pytest.raises(UserError, match="averages 2 networks") as refused:
        export_model(model, tmp_path / "out")
    assert "nnssl_predict" in str(refused.value)
    assert not (tmp_path / "out").exists()

    resumed = tiny.bare_trainer("CPS")
    resumed.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    assert resumed.deploy == "mean"
    assert _equal(resumed.network, trainer.network)
    assert _equal(resumed.second, trainer.second)


def test_the_best_checkpoint_of_the_mean_brings_back_both_networks(make):
    data, trainer = make(deploy="mean")
    trainer.train_step(data.batch(0))
    file = Path(trainer.output_folder, "best.pth")
    file.parent.mkdir(parents=True, exist_ok=True)
    save(trainer, file, resumable=False)
    assert "modules" not in read_model_checkpoint(file)["semi_supervised"]
    other = data.bare_trainer("CPS")
    other.load_checkpoint(str(file))
    assert _equal(other.network, trainer.network)
    assert _equal(other.second, trainer.second)
