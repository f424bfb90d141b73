"""Weights of the parts of nnU-Net's loss, and of rare classes in it."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from nnssl.errors import UserError
from nnssl.losses.labels import WeightedCrossEntropy
from nnssl.trainers.engine.class_balance import class_weights
from nnssl.trainers.engine.recipe import SHORT, SHORT_SEVERAL_CLASSES, describe_recipe
from tests.support.tiny import Tiny
from tests.trainers.test_blocks import heads_and_targets


def test_weights_are_those_of_the_labeled_voxels(tmp_path, monkeypatch):
    tiny = Tiny(classes=3).write(tmp_path, monkeypatch)
    trainer = tiny.trainer("Supervised", fold="all")
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, trainer.split().train)
    voxels = np.concatenate([np.asarray(dataset.load_case(c)[1][:]).ravel() for c in trainer.split().train])
    shares = np.bincount(voxels.clip(0), minlength=3) / len(voxels)
    assert (shares > 0).all()
    assert len(set(shares)) == 3
    weights = class_weights(trainer, 0.5).double().numpy()
    np.testing.assert_allclose(weights / weights[0], np.sqrt(shares[0] / shares), rtol=1e-5)
    assert (weights * shares).sum() == pytest.approx(1, rel=1e-5)
    np.testing.assert_allclose(class_weights(trainer, 1.0).numpy() * shares, 1 / 3, rtol=1e-5)


def test_cross_entropy_is_a_mean_over_voxels_that_count():
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    weights = torch.tensor([0.5, 1.0, 4.0])
    labels[0, 0] = 7
    each = cross_entropy(logits, labels, ignore_index=7, reduction="none")
    counted = labels != 7
    expected = (each * weights[labels * counted])[counted].mean()
    torch.testing.assert_close(WeightedCrossEntropy(weights, ignore_index=7)(logits, labels.float()), expected)
    assert WeightedCrossEntropy(weights, ignore_index=7)(logits, torch.full_like(labels, 7)) == 0


def test_cross_entropy_of_a_batch_is_the_mean_of_its_parts():
    """As ranks need it; PyTorch's own mean over weights is not."""
    logits, labels = torch.randn(2, 3, 20), torch.tensor([[0] * 20, [2] * 20])
    loss = WeightedCrossEntropy(torch.tensor([0.5, 1.0, 4.0]))
    parts = [loss(logits[row : row + 1], labels[row : row + 1]) for row in (0, 1)]
    torch.testing.assert_close(loss(logits, labels), (parts[0] + parts[1]) / 2)


@pytest.mark.parametrize("ignore", [False, True])
def test_the_loss_has_the_weights(tmp_path, monkeypatch, ignore):
    tiny = Tiny(classes=3, ignore=ignore).write(tmp_path, monkeypatch)
    plain = tiny.trainer("Supervised")
    weighted = tiny.trainer("Supervised", segmentation_dice_weight=5.0, rare_class_power=0.5)
    heads, targets = heads_and_targets(tiny, plain)
    expected = 0.0
    for head, target, share in zip(heads, targets, plain.loss.weight_factors, strict=True):
        labels, annotated = plain.annotation(head, target)
        weights = class_weights(weighted, 0.5)[labels.long()] * (1 if annotated is None else annotated)
        count = labels.numel() if annotated is None else annotated.sum()
        entropy = (cross_entropy(head, labels[:, 0].long(), reduction="none")[:, None] * weights).sum() / count
        expected += share * (1 / 3 * entropy + 5 / 3 * plain.dice_loss(head, labels, annotated))
    torch.testing.assert_close(weighted.segmentation_loss(heads, targets), expected)
    assert not torch.isclose(plain.segmentation_loss(heads, targets), expected)


@pytest.mark.parametrize(("relative", "weights"), [(1.0, (1.0, 1.0)), (3.0, (1.5, 0.5)), (0.25, (0.4, 1.6))])
def test_weights_of_dice_and_cross_entropy_have_nnunets_sum(tmp_path, monkeypatch, relative, weights):
    trainer = Tiny().write(tmp_path, monkeypatch).bare_trainer("Supervised")
    trainer.segmentation_dice_weight = relative
    assert trainer.segmentation_weights == pytest.approx(weights)


def test_masked_loss_has_the_weights(tmp_path, monkeypatch):
    tiny = Tiny(classes=3).write(tmp_path, monkeypatch)
    trainer = tiny.trainer("Supervised", segmentation_dice_weight=5.0, rare_class_power=0.5)
    heads, targets = heads_and_targets(tiny, trainer)
    everything = [torch.ones((2, 1, *head.shape[2:]), dtype=torch.bool) for head in heads]
    torch.testing.assert_close(
        trainer.masked_segmentation_loss(heads, targets, everything), trainer.segmentation_loss(heads, targets)
    )


def test_a_class_without_voxels_weighs_as_the_rarest(tmp_path, monkeypatch):
    tiny = Tiny(classes=2).write(tmp_path, monkeypatch)
    trainer = tiny.trainer("Supervised", fold="all")
    present = class_weights(trainer, 0.5)
    monkeypatch.setattr(type(trainer.label_manager), "all_labels", property(lambda self: [0, 1, 2]))
    with_absent = class_weights(trainer, 0.5)
    torch.testing.assert_close(with_absent[:2], present)
    assert with_absent[2] == present.max()


def test_a_run_that_began_before_the_recipe_keeps_its_loss(tmp_path, monkeypatch):
    tiny = Tiny(classes=3).write(tmp_path, monkeypatch)
    plain = {"segmentation_dice_weight": 1.0, "rare_class_power": 0.0, "warmup_steps": 0}
    trainer = tiny.trainer("Supervised", **plain)
    file = tmp_path / "old.pth"
    trainer.save_checkpoint(str(file))
    content = torch.load(file, weights_only=False)
    for name in plain:
        del content["semi_supervised"]["hyperparameters"][name]
    torch.save(content, file)
    continued = tiny.bare_trainer("Supervised")
    continued.load_checkpoint(str(file))
    assert {name: getattr(continued, name) for name in plain} == plain


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_unusable_powers_are_refused(tmp_path, monkeypatch, value):
    tiny = Tiny().write(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="rare_class_power"):
        tiny.trainer("Supervised", rare_class_power=value).on_train_start()


def test_regions_have_no_rare_class_power(tmp_path, monkeypatch):
    tiny = Tiny(regions=True, classes=3).write(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="0 where labels are regions"):
        tiny.trainer("Supervised", rare_class_power=0.5).on_train_start()


PLAIN = {"segmentation_dice_weight": 1.0, "rare_class_power": 0.0, "warmup_steps": 0}


@pytest.mark.parametrize(
    ("name", "classes", "regions", "expected"),  # background is one of the classes
    [
        ("Supervised", 3, False, SHORT_SEVERAL_CLASSES),
        ("MeanTeacher", 3, False, SHORT_SEVERAL_CLASSES),
        ("Supervised", 2, False, SHORT | PLAIN),
        ("Supervised", 3, True, SHORT | PLAIN),
        # which has a weight decay of its own
        ("ReciprocalLearning", 3, False, PLAIN | {"optimizer_name": "AdamW", "initial_lr": 2e-3}),
    ],
)
def test_short_trainings_have_weights_in_nnunets_loss(tmp_path, monkeypatch, name, classes, regions, expected):
    trainer = Tiny(classes=classes, regions=regions).write(tmp_path, monkeypatch).bare_trainer(name)
    trainer.configure({"num_epochs": 2, "num_iterations_per_epoch": 2})
    assert {name: getattr(trainer, name) for name in expected} == expected
    assert ("Dice weighs 16 times" in describe_recipe(trainer)) == (expected == SHORT_SEVERAL_CLASSES)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"recipe": "nnunet"}, PLAIN | {"optimizer_name": "SGD", "initial_lr": 1e-2}),
        ({"num_epochs": 1000, "num_iterations_per_epoch": 250}, PLAIN | {"optimizer_name": "SGD"}),
        ({"optimizer_name": "AdamW", "initial_lr": 2e-3, "weight_decay": 0.01}, PLAIN | {"initial_lr": 2e-3}),
        ({"optimizer_name": "AdamW", "initial_lr": 2e-3}, SHORT_SEVERAL_CLASSES | {"initial_lr": 2e-3}),
        ({"segmentation_dice_weight": 1.0}, SHORT_SEVERAL_CLASSES | {"segmentation_dice_weight": 1.0}),
    ],
)
def test_what_the_user_chooses_comes_before_the_recipe(tmp_path, monkeypatch, chosen, expected):
    trainer = Tiny(classes=3).write(tmp_path, monkeypatch).bare_trainer("Supervised")
    trainer.configure({"num_epochs": 2, "num_iterations_per_epoch": 2} | chosen)
    assert {name: getattr(trainer, name) for name in expected} == expected
