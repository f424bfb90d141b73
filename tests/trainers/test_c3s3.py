"""Checks of the specification of complementary competition and contrastive selection."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnssl.errors import UserError
from nnssl.inference.export import export_model
from nnssl.inference.models import find_model
from nnssl.inference.predictor import Predictor
from nnssl.networks.unwrap import deep_supervision, unwrap
from tests.support.tiny import DEVICE


@pytest.fixture
def make(build):
    return lambda options=None, **overrides: build("C3S3", options, **overrides)


def forwarded(trainer, batch, progress=1.0):
    step = trainer.make_step(batch)
    step.progress = progress
    trainer.prepare_step(step)
    trainer.forward(step)
    return step


def full(step):
    return [[heads[0] for heads in views] for views in step.extra["heads"]]


def touched(module):
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_the_networks_have_different_encoders_and_equal_heads(make):
    data, trainer = make()
    assert type(unwrap(trainer.network)).__name__ == "PlainConvUNet"
    assert type(trainer.second).__name__ == "ResidualEncoderUNet"
    first, second = step_heads = forwarded(trainer, data.batch(0)).extra["heads"]
    assert len(step_heads) == len(first) == len(second) == 2
    assert [h.shape for h in first[0]] == [h.shape for h in second[1]]


def test_the_views_differ_in_intensities_of_both_kinds_of_patches(make):
    data, trainer = make()
    step = forwarded(trainer, data.batch(0))
    assert all(not torch.equal(a, b) for a, b in zip(step.images, step.extra["view"], strict=True))
    single = trainer.heads(trainer.second, step.extra["view"])
    torch.testing.assert_close(step.extra["heads"][1][1][0], single[0])


def test_the_winner_is_chosen_on_labeled_patches_only_and_ties_go_to_the_second(make):
    data, trainer = make()
    step = forwarded(trainer, data.batch(0))
    logits = [[view.detach() for view in views] for views in full(step)]
    before = bool(trainer.first_wins(step, logits))
    assert bool(trainer.first_wins(step, logits[::-1])) != before
    for views in logits:
        for view in views:
            view[len(step.labeled) :] = torch.randn_like(view[len(step.labeled) :])
    assert bool(trainer.first_wins(step, logits)) == before
    assert not trainer.first_wins(step, [logits[0], logits[0]])


def test_score_of_the_competition(make):
    """One network has the lower cross entropy, the other the better Dice: alpha decides, at the value computed here."""
    data, trainer = make()
    step = forwarded(trainer, data.batch(0))
    truth = (step.target[0] == 1).float()
    wrong = torch.zeros_like(truth)
    wrong.view(-1)[:400] = 1
    views = []
    # sure and sometimes wrong, or always right and never sure; both views differ
    for size, errors in ((6.0, wrong), (5.0, wrong), (0.5, 0 * wrong), (0.4, 0 * wrong)):
        o = size * (2 * (truth - errors).abs() - 1)
        labeled = torch.cat([torch.zeros_like(o), o], 1)
        views.append(torch.cat([labeled, torch.zeros_like(step.heads[0][1:])]))
    logits = [views[:2], views[2:]]
    entropy, dice = [], []
    for pair in logits:
        o = [view[:1].double() for view in pair]
        p, t = [one.softmax(1)[:, 1] for one in o], truth[:, 0].double()
        entropy.append(sum(float(torch.nn.functional.cross_entropy(one, t.long())) for one in o))
        dice.append(sum(float(1 - (2 * (one * t).sum() + 1e-5) / (one.sum() + t.sum() + 1e-5)) for one in p))
    assert entropy[0] > entropy[1]
    assert dice[0] < dice[1]
    even = (dice[1] - dice[0]) / (entropy[0] - entropy[1] + dice[1] - dice[0])
    for alpha in (even - 1e-3, even + 1e-3):
        trainer.competition_alpha = alpha
        assert bool(trainer.first_wins(step, logits)) == (alpha < even)


def test_weights_of_the_terms(make):
    data, trainer = make()
    step = forwarded(trainer, data.batch(0))
    terms = trainer.unsupervised_loss(step)
    logits = full(step)
    wins = trainer.first_wins(step, logits)
    competition = trainer.competition_loss(wins, *([view[1:] for view in views] for views in logits))
    torch.testing.assert_close(terms["competition"], 0.1 * competition)
    torch.testing.assert_close(terms["contrast"], 2 * trainer.contrast_loss(step.extra["features"], logits))
    for network, found in enumerate((trainer.supervised_loss(step), terms["second_supervised"])):
        views = [[head[:1] for head in heads] for heads in step.extra["heads"][network]]
        torch.testing.assert_close(found, sum(trainer.loss(view, step.target) for view in views) / 2)
    step.progress = 0.5
    ramped = trainer.unsupervised_loss(step)["competition"] / terms["competition"]
    assert ramped.item() == pytest.approx(0.286505, rel=1e-4)


def test_sharpened_labels_of_the_winner(make):
    _, trainer = make()
    logits = torch.tensor([0.6, 0.4]).log().view(1, 2, 1, 1, 1)
    loser = torch.zeros(1, 2, 1, 1, 1)
    sharp = 0.6**10 / (0.6**10 + 0.4**10)
    assert sharp == pytest.approx(0.9830, abs=1e-4)
    expected = 2 * (sharp - 0.5) ** 2
    for wins, (first, second) in ((True, (logits, loser)), (False, (loser, logits))):
        loss = trainer.competition_loss(torch.tensor(wins), [first] * 2, [second] * 2)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("wins", [True, False])
def test_only_the_loser_learns_from_the_competition(make, monkeypatch, wins):
    data, trainer = make()
    step = forwarded(trainer, data.batch(0))
    monkeypatch.setattr(trainer, "first_wins", lambda step, logits: torch.tensor(wins, device=DEVICE))
    trainer.unsupervised_loss(step)["competition"].backward()
    assert touched(trainer.second) == wins
    assert touched(trainer.network) != wins


def test_cosine_of_the_views(make):
    data, trainer = make()
    step = forwarded(trainer, data.batch(0))
    terms = trainer.unsupervised_loss(step)
    assert 0 < terms["cosine"] <= 2
    one, other = full(step)[0]
    expected = 1 - torch.nn.functional.cosine_similarity(one, other, 1).mean()
    torch.testing.assert_close(terms["cosine"], expected)
    trainer.cosine_axis = "last"
    expected = 1 - torch.nn.functional.cosine_similarity(one, other, -1).mean()
    torch.testing.assert_close(trainer.unsupervised_loss(step)["cosine"], expected)
    trainer.strong_view = lambda images: images
    same = trainer.unsupervised_loss(forwarded(trainer, data.batch(0)))
    assert same["cosine"].item() == pytest.approx(0, abs=1e-6)
    assert same["second_cosine"].item() == pytest.approx(0, abs=1e-6)


def test_contrast_is_the_sum_over_four_pairs_of_views_and_all_patches(make):
    data, trainer = make({"classes": 4})
    step = forwarded(trainer, data.batch(0))
    logits, features = full(step), step.extra["features"]
    # class 3 is seen by neither
    for views in logits:
        for view in views:
            view.data[:, 3] = -100.0
    total = 0.0
    for i in range(2):
        for j in range(2):
            z = trainer.projector(features[0][i]), trainer.second_projector(features[1][j])
            s = torch.nn.functional.cosine_similarity(*z, dim=1).double().flatten() / 0.1
            a, b = logits[0][i].argmax(1).flatten(), logits[1][j].argmax(1).flatten()
            classes = [c for c in (1, 2) if bool(((a == c) | (b == c)).any())]
            for c in classes:
                for chosen in ((a == c) & (b == c), (a != c) & (b != c)):
                    up, down = (chosen * s).exp(), (~chosen * s).exp().sum()
                    total = total - (up / (up + down)).log().mean() / len(classes)
    assert trainer.contrast_loss(features, logits).item() == pytest.approx(float(total.detach()), rel=1e-4)
    trainer.unsupervised_loss(step)["contrast"].backward()
    assert all(touched(m) for m in (trainer.network, trainer.second, trainer.projector, trainer.second_projector))


def test_each_optimizer_trains_one_network_and_its_projector(make):
    data, trainer = make(gradient_clipping=1e-3)
    trainer.train_step(data.batch(0))
    for modules in ((trainer.network, trainer.projector), (trainer.second, trainer.second_projector)):
        gradients = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
        norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)
    groups = [trainer.optimizer, trainer._optimizers["second"]]
    counts = [sum(len(group["params"]) for group in one.param_groups) for one in groups]
    modules = (trainer.network, trainer.projector), (trainer.second, trainer.second_projector)
    assert counts == [sum(len(list(m.parameters())) for m in pair) for pair in modules]


def test_losses_of_the_phases(make):
    data, trainer = make(pretrain_share=0.5)
    # the streams deliver no unlabeled patches in a first phase
    batch = data.batch(0) | {"unlabeled": None}
    assert set(trainer.train_step(batch)) == {"loss", "supervised", "second_supervised"}
    trainer.train_step(data.batch(1))
    losses = trainer.train_step(data.batch(2))
    assert set(losses) == {
        "loss", "supervised", "second_supervised", "cosine", "second_cosine", "competition", "contrast", "first_wins"
    }  # fmt: skip
    assert float(losses["first_wins"]) in (0.0, 1.0)


@pytest.mark.parametrize("deploy", ["mean", "second", "first"])
def test_what_is_deployed_is_validated_saved_and_predicts(make, tmp_path, deploy):
    tiny, trainer = make(deploy=deploy, num_epochs=1, num_iterations_per_epoch=1)
    trainer.run_training()
    deployed = trainer.deployed_network()
    networks = {"mean": [trainer.network, trainer.second], "first": [trainer.network], "second": [trainer.second]}
    images = torch.randn(1, 1, 16, 16, 16, device=DEVICE)
    with torch.no_grad(), deep_supervision(trainer.network, False), deep_supervision(trainer.second, False):
        single = [unwrap(network)(images).softmax(1) for network in networks[deploy]]
        torch.testing.assert_close(deployed(images).softmax(1), sum(single) / len(single))
    model = find_model(tiny.base.name)
    ours = Predictor(device=torch.device("cpu"), precision="fp32", allow_tqdm=False)
    ours.initialize_from_model(model)
    saved, mine = ours.network.state_dict(), deployed.state_dict()
    assert saved.keys() == mine.keys()
    assert all(torch.equal(saved[key], mine[key].cpu()) for key in saved)
    assert ours.predict_logits_from_preprocessed_data(torch.randn(1, 20, 20, 20)).isfinite().all()
    if deploy == "first":
        export_model(model, tmp_path / "out")
    else:
        with pytest.raises(UserError, match="averages 2 networks" if deploy == "mean" else "another architecture"):
            export_model(model, tmp_path / "out")
    assert (tmp_path / "out").exists() == (deploy == "first")
    resumed = tiny.bare_trainer("C3S3")
    resumed.load_checkpoint(str(Path(trainer.output_folder, "checkpoint_final.pth")))
    for name in ("network", "second", "projector"):
        pairs = zip(
            unwrap(getattr(resumed, name)).parameters(), unwrap(getattr(trainer, name)).parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "setting",
    [
        {"competition_alpha": 1.1},
        {"competition_weight": -1.0},
        {"sharpening": 0.0},
        {"contrast_temperature": 0.0},
        {"embedding_channels": 0},
    ],
)
def test_unusable_values_are_refused(make, setting):
    with pytest.raises(UserError, match="unusable") as error:
        make(**setting)[1].check_settings()
    assert "--set" in str(error.value)
