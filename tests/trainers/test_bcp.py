"""Checks of the specification of bidirectional copy-paste."""

from __future__ import annotations

import pytest
import torch

from nnssl.augmentation.boxes import box_edges
from nnssl.errors import UserError
from nnssl.networks.unwrap import unwrap
from tests.support.tiny import Tiny


@pytest.fixture
def make(tmp_path, monkeypatch):
    def trainer_of(classes=2, labeled_batch=2, **overrides):
        data = Tiny(labeled_batch=labeled_batch, classes=classes)
        data.write(tmp_path / str(len(list(tmp_path.iterdir()))), monkeypatch)
        return data, data.trainer("BCP", **overrides)

    yield trainer_of
    torch.use_deterministic_algorithms(False)


def main_step(trainer, batch):
    """A step of the main phase, mixed, with the predictions of the student."""
    trainer.iteration = trainer.pretrain_steps
    step = trainer.make_step(batch)
    trainer.prepare_step(step)
    trainer.forward(step)
    return step


def values(module):
    return [p.detach().clone() for p in module.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def same_halves(batch):
    """The batch with all its labeled patches alike, and all its unlabeled ones."""
    batch["data"][1], batch["unlabeled"][1] = batch["data"][0], batch["unlabeled"][0]
    for target in batch["target"]:
        target[1] = target[0]
    return batch


def test_both_directions_together_hold_the_labeled_and_the_unlabeled_patch(make):
    data, trainer = make()
    batch = same_halves(data.batch(0))
    step = main_step(trainer, batch)
    box = step.extra["is_labeled"][0][1]
    assert torch.equal(step.extra["is_labeled"][0][0], ~box)
    x_in, x_out = step.labeled
    assert torch.equal(torch.where(box, x_out, x_in), batch["data"][0])
    assert torch.equal(torch.where(box, x_in, x_out), batch["unlabeled"][0])


def test_volume_of_the_box(make):
    _, trainer = make()
    for shape, low, high in (((112, 112, 80), 0.2892, 0.2893), ((96, 96, 96), 0.296, 0.297)):
        edges = box_edges(shape, trainer.box_edge)
        share = torch.tensor([e / n for e, n in zip(edges, shape, strict=True)]).prod()
        assert low < share < high
    data, trainer = make()
    step = main_step(trainer, data.batch(0))
    assert step.extra["is_labeled"][0].sum((1, 2, 3, 4)).tolist() == [16**3 - 10**3, 10**3]


def test_true_labels_on_both_sides_give_the_masked_losses_of_both(make, monkeypatch):
    data, trainer = make(pseudo_weight=1.0)
    step = main_step(trainer, data.batch(0))
    true = data.batch(7)["target"][0]
    monkeypatch.setattr(trainer, "pseudo_labels", lambda logits: true)
    total = trainer.supervised_loss(step) + trainer.unsupervised_loss(step)["pseudo"]
    expected = 0.0
    weights = trainer.loss.weight_factors
    for head, target, labeled, weight in zip(step.heads, step.target, step.extra["is_labeled"], weights, strict=True):
        edge = head.shape[-1]
        other = true if edge == 16 else torch.nn.functional.interpolate(true.float(), (edge,) * 3, mode="nearest-exact")
        for reference, mask in ((target, labeled), (other, ~labeled)):
            for row in range(2):
                at = mask[row, 0]
                logits, truth = head[row][:, at], reference[row, 0][at].long()
                ce = torch.nn.functional.cross_entropy(logits.T, truth)
                p, y = logits.softmax(0)[1], truth == 1
                dice = (2 * (p * y).sum() + 1e-5) / (p.sum() + y.sum() + 1e-5)
                expected = expected + float(weight) * (ce - dice) / 2
    torch.testing.assert_close(total, expected)


def test_pseudo_labels_weigh_half(make):
    data, trainer = make()
    step = main_step(trainer, data.batch(0))
    half = trainer.unsupervised_loss(step)["pseudo"]
    trainer.pseudo_weight = 1.0
    torch.testing.assert_close(2 * half, trainer.unsupervised_loss(step)["pseudo"])


def test_images_and_labels_share_the_mask_at_every_head(make):
    data, trainer = make()
    batch = data.batch(0)
    # labels and images are the same numbers, so that mixed images show which labels belong to them
    batch["data"] = batch["target"][0].float() + 5
    batch["unlabeled"] = torch.zeros_like(batch["unlabeled"])
    step = main_step(trainer, batch)
    for target, mask in zip(step.target, step.extra["is_labeled"], strict=True):
        assert mask.dtype == torch.bool
        scale = 16 // mask.shape[-1]
        image = torch.nn.functional.interpolate(step.labeled, mask.shape[2:], mode="nearest-exact")
        assert torch.equal(image > 0, mask)
        if scale == 1:
            assert torch.equal(image[mask], target[mask].float() + 5)


def test_first_phase_pastes_labeled_patches_with_their_labels_into_each_other(make, monkeypatch):
    data, trainer = make()
    batch = data.batch(0)
    batch["data"] = batch["target"][0].float() + torch.tensor([10.0, 20.0]).view(2, 1, 1, 1, 1)
    step = trainer.make_step(batch)
    trainer.prepare_step(step)
    assert torch.equal(step.labeled % 10, step.target[0].float())
    other = step.labeled.round(decimals=-1) == torch.tensor([20.0, 10.0]).view(2, 1, 1, 1, 1)
    assert other.sum((1, 2, 3, 4)).tolist() == [10**3] * 2
    assert torch.equal(other[0], other[1])
    assert len(step.unlabeled) == 0
    losses = trainer.pretrain_losses(step)
    assert torch.equal(losses["supervised"], trainer.segmentation_loss(step.heads, step.target))


def test_the_phases_have_the_published_lengths_and_the_teacher_starts_as_the_student(make):
    data, trainer = make(num_epochs=17, num_iterations_per_epoch=1)
    assert trainer.pretrain_steps == 2
    for seed in range(2):
        assert set(trainer.train_step(data.batch(seed))) == {"loss", "supervised"}
    student = values(unwrap(trainer.network))
    trainer.start_main_phase()
    assert equal(values(trainer.teacher), student)
    assert set(trainer.train_step(data.batch(2))) == {"loss", "supervised", "pseudo"}
    means = [0.99 * a + 0.01 * b for a, b in zip(student, values(unwrap(trainer.network)), strict=True)]
    assert all(torch.allclose(a, b) for a, b in zip(values(trainer.teacher), means, strict=True))


def test_teacher_is_frozen_with_decay_one(make):
    data, trainer = make(ema_decay=1.0, pretrain_share=0.0)
    before = values(trainer.teacher)
    for seed in range(2):
        trainer.train_step(data.batch(seed))
    assert equal(before, values(trainer.teacher))
    assert not equal(before, values(unwrap(trainer.network)))


@pytest.mark.parametrize(
    ("setting", "classes", "cleaned"),
    [("auto", 2, True), ("auto", 3, False), ("on", 3, True), ("off", 2, False)],
)
def test_largest_component_is_kept_of_a_single_structure(make, setting, classes, cleaned):
    _, trainer = make(classes, largest_component=setting)
    logits = torch.zeros(1, classes, 8, 8, 8)
    logits[:, 1, :3] = logits[:, 1, 6:7] = 5
    logits[:, 0] += 1
    labels = trainer.pseudo_labels(logits)
    assert labels[:, :, :3].all()
    assert bool(labels[:, :, 6:7].any()) != cleaned


def test_ignored_voxels_of_the_labeled_part_do_not_count(make, tmp_path, monkeypatch):
    data = Tiny(labeled_batch=2, ignore=True).write(tmp_path / "ignore", monkeypatch)
    trainer = data.trainer("BCP")
    batch = data.batch(0)
    for target in batch["target"]:
        target[..., : target.shape[-1] // 2] = 2
    step = main_step(trainer, batch)
    before = trainer.supervised_loss(step)
    assert before > 0
    step.heads = [head.detach().clone() for head in step.heads]
    for head in step.heads:
        head[:, 0, ..., : head.shape[-1] // 2] += 3
    assert torch.equal(trainer.supervised_loss(step), before)
    step.heads[0][:, 0, ..., 8:] += 3
    assert not torch.equal(trainer.supervised_loss(step), before)


@pytest.mark.parametrize("setting", [{"box_edge": 1.0}, {"box_edge": 0.0}, {"pseudo_weight": -0.1}, {"ema_decay": 1.5}])
def test_unusable_values_are_refused(make, setting):
    with pytest.raises(UserError, match="unusable") as error:
        make(**setting)[1].check_settings()
    assert "--set" in str(error.value)


def test_a_single_labeled_patch_is_refused_with_the_way_out(make):
    _, trainer = make(labeled_batch=1)
    with pytest.raises(UserError, match="labeled_batch_size=2"):
        trainer.run_training()
    assert trainer.iteration == 0
