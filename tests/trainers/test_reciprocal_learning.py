"""Checks of the specification of reciprocal learning."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from nnssl.errors import UserError
from nnssl.inference.checkpoint import read_model_checkpoint
from nnssl.losses.labels import resized_labels
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.run_settings import RunSettings
from tests.support.tiny import Tiny


@pytest.fixture
def make(tmp_path, monkeypatch):
    data = Tiny(labeled_batch=2).write(tmp_path, monkeypatch)

    def trainer_of(**overrides):
        return data, data.trainer("ReciprocalLearning", **{"pretrain_share": 0.0} | overrides)

    yield trainer_of
    torch.use_deterministic_algorithms(False)


def values(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def train_alone(trainer, network, images, targets):
    """Trains ``network`` on each pair of images and targets by cross entropy, as one network of the trainer."""
    optimizer = trainer.new_optimizer(network.parameters())
    for image, target in zip(images, targets, strict=True):
        optimizer.zero_grad()
        heads = trainer.heads(network, image)
        loss = trainer.over_heads(trainer.cross_entropy, heads, target)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), trainer.gradient_clipping)
        optimizer.step()
    return values(network)


def feedback(trainer, batch):
    """h of the next step of the student."""
    step = trainer.make_step(batch)
    return trainer.move_student(step, trainer.unsupervised_loss(step)["pseudo"])


def test_without_feedback_the_teacher_learns_as_a_supervised_network(make):
    data, trainer = make()
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    batches = [data.batch(seed) for seed in range(3)]
    expected = train_alone(
        trainer, deepcopy(trainer.teacher), [b["data"] for b in batches], [b["target"] for b in batches]
    )
    for batch in batches:
        losses = trainer.train_step(batch)
        assert losses["h"] == 0
        assert losses["feedback"] == 0
    assert equal(values(trainer.teacher), expected)


def test_h_is_the_fall_of_the_labeled_loss_to_first_order(make):
    data, trainer = make(enable_deep_supervision=False)
    batch = data.batch(0)
    batch["data"] = batch["target"][0].float() + 0.5 * batch["data"]
    start = nn.Conv3d(1, 2, 1, bias=False)
    with torch.no_grad():
        start.weight[:, 0] = torch.tensor([0.5, -0.2]).view(2, 1, 1, 1)

    def error_of(rate):
        trainer.network = deepcopy(start)
        trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), rate)
        trainer.measurement = torch.optim.SGD(trainer.network.parameters())

        def labeled_loss():
            with torch.no_grad():
                (logits,) = trainer.heads(trainer.network, batch["data"])
                return trainer.cross_entropy(logits.double(), batch["target"][0])

        before = labeled_loss()
        h = feedback(trainer, batch)
        fall = (before - labeled_loss()).item()
        assert fall != 0
        return abs(h.item() - fall) / abs(fall)

    errors = [error_of(rate) for rate in (0.2, 0.1, 0.05)]
    assert errors[0] < 0.2
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize(("inverted", "sign"), [(False, 1), (True, -1)])
def test_labels_that_are_right_help_and_wrong_ones_hurt(make, monkeypatch, inverted, sign):
    data, trainer = make()
    batch = data.batch(0)
    batch["unlabeled"] = batch["data"]
    with torch.no_grad():  # a student that finds all classes equally likely
        for p in unwrap(trainer.network).decoder.seg_layers.parameters():
            p.zero_()
    true = batch["target"][0].long()
    monkeypatch.setattr(trainer, "hard_labels", lambda logits: 1 - true if inverted else true)
    assert sign * feedback(trainer, batch) > 0


def test_the_student_learns_from_pseudo_labels_alone_and_measuring_leaves_it_alone(make):
    """With a frozen teacher this is plain hard pseudo-labeling."""
    data, trainer = make()
    trainer._optimizers["teacher"].param_groups[0]["lr"] = 0.0
    teacher = values(trainer.teacher)
    batches = [data.batch(seed) for seed in range(3)]

    def labels_of(images):
        heads = trainer.heads(trainer.teacher, images)
        return resized_labels(heads[0].detach().argmax(1, keepdim=True), [head.shape[2:] for head in heads])

    images = [batch["unlabeled"] for batch in batches]
    expected = train_alone(trainer, deepcopy(unwrap(trainer.network)), images, [labels_of(image) for image in images])
    for batch in batches:
        losses = trainer.train_step(batch)
        assert losses["h"] != 0
        assert all(p.grad is None for p in trainer.network.parameters())
    assert equal(values(unwrap(trainer.network)), expected)
    assert equal(values(trainer.teacher), teacher)


def test_no_gradient_passes_through_the_pseudo_labels_or_from_one_network_to_the_other(make):
    data, trainer = make()
    step = trainer.make_step(data.batch(0))
    losses = trainer.unsupervised_loss(step)
    assert not any(labels.requires_grad for labels in step.extra["pseudo_labels"])
    trainer.move_student(step, losses["pseudo"])
    assert all(p.grad is None for p in trainer.teacher.parameters())
    student = values(unwrap(trainer.network))
    trainer.backward_and_update(trainer.supervised_loss(step), trainer._optimizers["teacher"])
    assert all(p.grad is None for p in trainer.network.parameters())
    assert equal(values(unwrap(trainer.network)), student)


def test_the_teacher_moves_along_both_gradients(make):
    data, trainer = make(supervised_weight=2.0)
    trainer.optimizer.param_groups[0]["lr"] = 0.5
    reference = deepcopy(trainer.teacher)
    batch = data.batch(0)
    step = trainer.make_step(batch)
    h = deepcopy(trainer).train_step(batch)["h"]
    heads = trainer.heads(reference, step.unlabeled)
    labels = resized_labels(trainer.hard_labels(heads[0]), [head.shape[2:] for head in heads])
    own = trainer.over_heads(trainer.cross_entropy, heads, labels)
    supervised = trainer.over_heads(trainer.cross_entropy, trainer.heads(reference, step.labeled), step.target)
    optimizer = trainer.new_optimizer(reference.parameters())
    (h * own + 2 * supervised).backward()
    nn.utils.clip_grad_norm_(reference.parameters(), trainer.gradient_clipping)
    optimizer.step()
    assert abs(h) > 1e-4
    losses = trainer.train_step(batch)
    for a, b in zip(values(trainer.teacher), values(reference), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["feedback"], h * own.detach())
    torch.testing.assert_close(losses["loss"], losses["pseudo"] + losses["supervised"] + losses["feedback"])


def test_h_does_not_depend_on_the_scale_of_the_loss(make):
    data, first = make()
    found = []
    for scaler in (None, *(torch.amp.GradScaler("cpu", init_scale=scale) for scale in (1.0, 65536.0))):
        trainer = deepcopy(first)
        trainer.grad_scaler = scaler
        found.append(trainer.train_step(data.batch(0))["h"].item())
    assert found[0] != 0
    assert found[1:] == pytest.approx(found[:1] * 2, rel=1e-6)


def test_gradients_that_are_not_finite_give_no_feedback(make):
    data, trainer = make()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    student, teacher = values(unwrap(trainer.network)), values(trainer.teacher)
    assert trainer.train_step(data.batch(0))["h"] == 0
    assert equal(values(unwrap(trainer.network)), student)
    assert equal(values(trainer.teacher), teacher)


def test_a_measurement_that_is_not_finite_lowers_the_scale_of_the_loss(make, monkeypatch):
    data, trainer = make()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    backward = trainer.backward

    def overflow(loss, *optimizers):
        backward(loss * float("inf") if trainer.measurement in optimizers else loss, *optimizers)

    monkeypatch.setattr(trainer, "backward", overflow)
    student, teacher = values(unwrap(trainer.network)), values(trainer.teacher)
    assert trainer.train_step(data.batch(0))["h"] == 0
    assert not equal(values(unwrap(trainer.network)), student)
    assert not equal(values(trainer.teacher), teacher)
    assert trainer.grad_scaler.get_scale() == 4.0


def test_h_can_be_limited(make):
    data, trainer = make()
    free = feedback(deepcopy(trainer), data.batch(0)).item()
    trainer.feedback_limit = abs(free) / 2
    assert feedback(trainer, data.batch(0)).item() == pytest.approx(free / 2)


def test_the_student_alone_predicts(make):
    data, trainer = make()
    trainer.train_step(data.batch(0))
    images = data.batch(1)["data"]
    expected = trainer.heads(trainer.network, images)[0]
    file = Path(trainer.output_folder, "checkpoint_final.pth")
    with torch.no_grad():
        for p in trainer.teacher.parameters():
            p.zero_()
    trainer.save_checkpoint(str(file))
    network = trainer.new_network()
    network.load_state_dict(read_model_checkpoint(file)["network_weights"])
    assert torch.equal(trainer.heads(network, images)[0], expected)
    assert expected.abs().max() > 0


def test_the_first_half_trains_the_teacher_alone_by_cross_entropy(make):
    data, trainer = make(pretrain_share=0.5)
    assert make()[1].pretrain_steps == 0
    student = values(unwrap(trainer.network))
    batches = [data.batch(seed) for seed in range(2)]
    expected = train_alone(
        trainer, deepcopy(trainer.teacher), [b["data"] for b in batches], [b["target"] for b in batches]
    )
    for batch in batches:
        assert set(trainer.train_step(batch)) == {"loss", "supervised"}
    assert not trainer.pretraining
    assert equal(values(trainer.teacher), expected)
    assert equal(values(unwrap(trainer.network)), student)
    assert not equal(student, expected)
    trainer.current_epoch = 1  # in whose place the schedule would be lower if it did not start again
    assert set(trainer.train_step(data.batch(2))) == {"loss", "supervised", "pseudo", "feedback", "h"}
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.initial_lr
    assert not equal(values(unwrap(trainer.network)), student)


def test_the_student_can_start_as_the_teacher(make):
    _, trainer = make(student_start="teacher")
    trainer.start_main_phase()
    assert equal(values(unwrap(trainer.network)), values(trainer.teacher))


def test_both_optimizers_have_the_published_settings_or_those_of_nnunet(make):
    def settings(trainer):
        names = ("momentum", "nesterov", "weight_decay", "lr")
        optimizers = (trainer.optimizer, *trainer._optimizers.values())
        return [[o.param_groups[0][name] for name in names] for o in optimizers]

    assert settings(make(recipe="nnunet")[1]) == [[0.9, False, 1e-4, 0.01]] * 2
    stock = {"momentum": 0.99, "nesterov": True, "weight_decay": 3e-5}
    assert settings(make(**stock)[1]) == [[0.99, True, 3e-5, 0.01]] * 2


def test_the_teacher_can_learn_from_dice_too(make):
    data, trainer = make(teacher_loss="dice_ce")
    step = trainer.make_step(data.batch(0))
    heads = trainer.heads(trainer.teacher, step.labeled)
    assert torch.equal(trainer.supervised_loss(step), trainer.loss(heads, step.target))


@pytest.mark.parametrize(
    "setting",
    [
        {"supervised_weight": -1.0},
        {"feedback_limit": 0.0},
        {"momentum": 1.0},
        {"momentum": 0.0, "nesterov": True},
        {"segmentation_dice_weight": 16.0},
        {"rare_class_power": 0.5},
    ],
)
def test_unusable_values_are_refused(make, setting):
    with pytest.raises(UserError):
        make(**setting)[1].check_settings()


def test_weights_of_the_loss_are_for_its_dice(make):
    make(teacher_loss="dice_ce", segmentation_dice_weight=16.0, rare_class_power=0.5)[1].check_settings()


def test_pretrained_weights_go_into_both_networks(make):
    data, trained = make()
    file = Path(trained.output_folder, "pretrained.pth")
    file.parent.mkdir(parents=True, exist_ok=True)
    trained.save_checkpoint(str(file))
    started = data.bare_trainer("ReciprocalLearning")
    started.configure({}, RunSettings(seed=1, pretrained_weights=str(file)))
    started.initialize()
    for network in (started.network, started.teacher):
        weights, wanted = network.state_dict(), trained.network.state_dict()
        differing = {key for key in wanted if not torch.equal(weights[key], wanted[key])}
        assert differing
        assert all(".seg_layers." in key for key in differing)
