from __future__ import annotations

import pytest
import torch

from nnssl.errors import UserError
from nnssl.trainers.engine.distributed import Ranks
from tests.support.tiny import Tiny


@pytest.fixture(autouse=True)
def any_kernels():
    yield
    torch.use_deterministic_algorithms(False)


def heads_and_targets(tiny: Tiny, trainer) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    heads, targets = [], []
    for edge in (16, 8):
        shape = (edge,) * tiny.dimensions
        heads.append(torch.randn((2, trainer.label_manager.num_segmentation_heads, *shape), generator=generator))
        if tiny.regions:
            targets.append(torch.rand((2, 2 + tiny.ignore, *shape), generator=generator) > 0.5)
        else:
            targets.append(torch.randint(tiny.classes + tiny.ignore, (2, 1, *shape), generator=generator).short())
    return heads, targets


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_cross_entropy_over_heads_is_that_of_nnunets_loss(tmp_path, monkeypatch, regions, ignore):
    tiny = Tiny(regions=regions, ignore=ignore, classes=3).write(tmp_path, monkeypatch)
    trainer = tiny.trainer("Supervised", recipe="nnunet")
    heads, targets = heads_and_targets(tiny, trainer)
    trainer.loss.loss.weight_dice = 0
    expected = trainer.loss(heads, targets)
    if regions and ignore:  # where nnU-Net takes the sum over the two regions, not their mean
        expected = expected / 2
    torch.testing.assert_close(trainer.over_heads(trainer.cross_entropy, heads, targets), expected)


def test_only_the_full_resolution_counts_without_deep_supervision(tmp_path, monkeypatch):
    tiny = Tiny().write(tmp_path, monkeypatch)
    trainer = tiny.trainer("Supervised", enable_deep_supervision=False)
    heads, targets = heads_and_targets(tiny, trainer)
    expected = trainer.cross_entropy(heads[0], targets[0])
    assert trainer.over_heads(trainer.cross_entropy, heads, targets) == expected


def test_weights_choose_the_voxels_that_cross_entropy_averages(tmp_path, monkeypatch):
    tiny = Tiny().write(tmp_path, monkeypatch)
    trainer = tiny.trainer("Supervised")
    (logits, _), (target, _) = heads_and_targets(tiny, trainer)
    left = torch.zeros(1, 1, 16, 16, 16)
    left[..., :8] = 1
    expected = trainer.cross_entropy(logits[..., :8], target[..., :8])
    torch.testing.assert_close(trainer.cross_entropy(logits, target, left), expected)
    assert trainer.cross_entropy(logits, target, torch.zeros_like(left)) == 0


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("regions", [False, True])
def test_masked_loss_of_all_voxels_is_nnunets(tmp_path, monkeypatch, regions, ignore):
    tiny = Tiny(regions=regions, ignore=ignore, classes=3).write(tmp_path, monkeypatch)
    trainer = tiny.trainer("Supervised")
    heads, targets = heads_and_targets(tiny, trainer)
    heads, targets = [head[:1] for head in heads], [target[:1] for target in targets]
    if regions and ignore:  # nnU-Net takes the sum of the cross entropies of regions, not their mean
        trainer.loss.loss.weight_ce = 0.5
    everything = [torch.ones((1, 1, *head.shape[2:]), dtype=torch.bool) for head in heads]
    torch.testing.assert_close(
        trainer.masked_segmentation_loss(heads, targets, everything), trainer.loss(heads, targets)
    )


@pytest.mark.parametrize("regions", [False, True])
def test_masked_loss_sees_what_is_inside_alone_and_weighs_patches_alike(tmp_path, monkeypatch, regions):
    tiny = Tiny(regions=regions, classes=3).write(tmp_path, monkeypatch)
    trainer = tiny.trainer("Supervised")
    heads, targets = heads_and_targets(tiny, trainer)
    masks = []
    for head in heads:
        mask = torch.zeros((2, 1, *head.shape[2:]), dtype=torch.bool)
        half = head.shape[-1] // 2
        mask[0, ..., :half] = True
        mask[1, ..., : half // 2] = True
        masks.append(mask)
    alone = []
    for row, share in enumerate((2, 4)):
        parts = [[t[row : row + 1, ..., : t.shape[-1] // share] for t in each] for each in (heads, targets)]
        alone.append(trainer.loss(*parts))
    found = trainer.masked_segmentation_loss(heads, targets, masks)
    torch.testing.assert_close(found, (alone[0] + alone[1]) / 2)


def test_masked_loss_of_nothing_has_no_gradient(tmp_path, monkeypatch):
    tiny = Tiny().write(tmp_path, monkeypatch)
    trainer = tiny.trainer("Supervised")
    heads, targets = heads_and_targets(tiny, trainer)
    heads = [head.requires_grad_() for head in heads]
    nothing = [torch.zeros((2, 1, *head.shape[2:]), dtype=torch.bool) for head in heads]
    trainer.masked_segmentation_loss(heads, targets, nothing).backward()
    assert all(head.grad.abs().max() == 0 for head in heads if head.grad is not None)


@pytest.mark.parametrize("settings", [{"momentum": 1.0}, {"momentum": 0.0}, {"momentum": -0.5, "nesterov": False}])
def test_momentum_that_sgd_cannot_have_is_refused(tmp_path, monkeypatch, settings):
    tiny = Tiny().write(tmp_path, monkeypatch)
    with pytest.raises(UserError, match="momentum"):
        tiny.trainer("Supervised", **settings)


def test_hard_labels_of_a_prediction_are_its_targets(tmp_path, monkeypatch):
    for regions in (False, True):
        tiny = Tiny(regions=regions, classes=3).write(tmp_path / str(regions), monkeypatch)
        trainer = tiny.trainer("Supervised")
        (logits, _), _ = heads_and_targets(tiny, trainer)
        labels = trainer.hard_labels(logits)
        assert labels.shape[1] == (2 if regions else 1)
        assert trainer.cross_entropy(1e4 * logits, labels) < 1e-3


def test_masked_mean_does_not_depend_on_the_area(tmp_path, monkeypatch):
    trainer = Tiny().write(tmp_path, monkeypatch).trainer("Supervised")
    values = torch.full((2, 3, 8), 0.3)
    for area in (1, 4, 8):
        mask = (torch.arange(8) < area).expand(2, 1, 8)
        assert trainer.masked_mean(values, mask).item() == pytest.approx(0.3)
    assert trainer.masked_mean(values, torch.zeros(2, 1, 8, dtype=torch.bool)) == 0
    values[:, 1] = 0.6
    per_class = torch.zeros(2, 3, 8)
    per_class[:, 1:] = 1
    assert trainer.masked_mean(values, per_class).item() == pytest.approx(0.45)


def test_ranks_share_random_numbers_and_the_area_of_a_mask(tmp_path, monkeypatch):
    trainer = Tiny().write(tmp_path, monkeypatch).trainer("Supervised")
    torch.manual_seed(0)
    whole = trainer.uniform(4, 3)
    assert 0 <= whole.min() < whole.max() < 1
    values, mask = torch.rand(4, 1, 3), torch.rand(4, 1, 3) > 0.5
    expected, own = trainer.masked_mean(values, mask), []
    for rank in range(2):
        trainer.ranks = Ranks(rank, 2, store=torch.distributed.HashStore())
        monkeypatch.setattr(trainer.ranks, "mean", lambda area: mask.sum() / 2)
        torch.manual_seed(0)
        rows = trainer.ranks.rows(2)
        assert torch.equal(trainer.uniform(2, 3), whole[rows.start : rows.stop])
        own.append(trainer.masked_mean(values[rows.start : rows.stop], mask[rows.start : rows.stop]))
    torch.testing.assert_close(torch.stack(own).mean(), expected)
