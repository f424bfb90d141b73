"""Checks of the specification of confidence-aware adaptive displacement."""

from __future__ import annotations

import pytest
import torch

from nnssl.errors import UserError
from nnssl.networks.unwrap import unwrap
from nnssl.trainers.engine.catalog import describe, table

PAIRED = {"labeled_batch": 2, "unlabeled_batch": 2, "channels": 2}
GRID = (4, 4, 4)


@pytest.fixture
def make(build):
    return lambda options=PAIRED, **overrides: build("CAD", options, **overrides)


def forwarded(trainer, batch, progress=1.0):
    step = trainer.make_step(batch)
    step.progress = progress
    trainer.prepare_step(step)
    trainer.forward(step)
    return step


def logits_of(confidence):
    """Full-resolution logits of two classes for confidences of cells ``(N, *GRID)``."""
    p = (1 + torch.as_tensor(confidence)) / 2
    cells = torch.stack([p.logit(eps=1e-6), torch.zeros_like(p)], 1)
    for axis in range(2, cells.ndim):
        cells = cells.repeat_interleave(4, axis)
    return cells


def unsure_at(*places, rows=2, low=0.1, sure=0.97):
    confidence = torch.full((rows, *GRID), sure)
    for place in places:
        confidence[(slice(None), *place)] = low
    return logits_of(confidence)


def displaced(trainer, data, weak, strong, progress=1.0, batch=None):
    step = trainer.make_step(batch or data.batch(0))
    step.progress = progress
    views = torch.randn(2, 2, *data.patch), torch.randn(2, 2, *data.patch)
    result = trainer.displaced(step, views, (weak, strong)).chunk(2)
    return step, views, result


def test_nothing_is_replaced_below_the_threshold_zero(make):
    data, trainer = make(threshold_start=0.0, threshold_end=0.0)
    step, views, result = displaced(trainer, data, unsure_at((0, 0, 0), low=0.0), unsure_at())
    assert all(torch.equal(a, b) for a, b in zip(views, result, strict=True))
    assert step.extra["facts"] == {"replaced": 0, "foreground_sources": 0}


def test_the_larger_of_two_regions_is_replaced_from_the_other_unchanged_view(make):
    data, trainer = make()
    one = unsure_at((0, 0, 0), (3, 3, slice(2, 4)))
    other = unsure_at((slice(1, 3), 1, 1))
    step, (weak, strong), (weak_after, strong_after) = displaced(trainer, data, one, other)
    assert step.extra["facts"]["replaced"] == 1
    for before, after, source, cells in ((weak, weak_after, strong, (3, 3, slice(2, 4))), (strong, strong_after, weak,
                                          (slice(1, 3), 1, 1))):  # fmt: skip
        changed = (before != after).any(1, keepdim=True)
        allowed = torch.zeros(2, *GRID, dtype=torch.bool)
        allowed[(slice(None), *cells)] = True
        for axis in range(1, 4):
            allowed = allowed.repeat_interleave(4, axis)
        assert not (changed & ~allowed[:, None]).any()
        assert 0 < changed.sum((1, 2, 3, 4)).max() <= 4**3, "edges are a quarter of the patch at most"
        # all channels of what was pasted stand at one place of the other view
        for row in range(2):
            where = changed[row, 0].nonzero()
            first = [slice(int(a), int(b) + 1) for a, b in zip(where.amin(0), where.amax(0), strict=True)]
            pasted = after[(row, slice(None), *first)]
            pieces = source[row]
            for axis in range(1, 4):
                pieces = pieces.unfold(axis, pasted.shape[axis], 1)
            matches = (pieces == pasted[:, None, None, None]).flatten(4).all(4).all(0)
            assert matches.sum() == 1
            assert all(int(place) % 4 == 0 for place in matches.nonzero()[0])


def test_the_choice_between_equal_regions_is_the_same_each_time(make):
    data, trainer = make()
    torch.manual_seed(0)
    first = displaced(trainer, data, unsure_at((0, 0, 0), (3, 3, 3)), unsure_at())
    torch.manual_seed(0)
    second = displaced(trainer, data, unsure_at((0, 0, 0), (3, 3, 3)), unsure_at())
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))
    assert not torch.equal(first[1][0], first[2][0])


def test_padding_takes_no_part(make):
    data, trainer = make()
    step = trainer.make_step(data.batch(0))
    step.progress = 1.0
    views = [torch.randn(2, 2, *data.patch) for _ in range(2)]
    for view in views:
        view[:, :, :8] = 0.0
    # padding is unsure in one view and surest in the other
    weak, strong = unsure_at((slice(0, 2),), (3, 3, 3)), unsure_at((slice(2, 4),), low=0.93, sure=0.99)
    result = trainer.displaced(step, tuple(views), (weak, strong))[:2]
    changed = (result != views[0]).any(1)
    assert changed.any()
    assert not changed[:, :8].any()
    assert (result[:, :, 12:] != 0).all()


def test_schedules_only_rise_and_end_as_declared(make, monkeypatch):
    _, trainer = make()
    seen = []
    monkeypatch.setattr("nnssl.trainers.cad.largest_edges", lambda shape, share: seen.append(share) or (1, 1, 1))
    confidence = torch.full((1, 1, *GRID), 0.95)
    thresholds = []
    for i in range(11):
        limit = 0.5 + 0.04 * i
        confidence[0, 0, 0, 0, 0] = limit - 1e-3
        confidence[0, 0, 3, 3, 3] = limit + 1e-3
        good, logits = torch.ones_like(confidence, dtype=torch.bool), torch.zeros(1, 2, *GRID)
        targets, _ = trainer.windows(i / 10, good, [logits] * 2, [confidence] * 2, 0, 1)
        assert targets.found.all()
        thresholds.append(targets.corners.tolist())
    assert thresholds == [[[0, 0, 0]]] * 11
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (1 / 8, 1 / 4)


def test_no_gradient_flows_into_teacher_labels_or_choices(make):
    data, trainer = make()
    step = forwarded(trainer, data.batch(0))
    terms = {"supervised": trainer.supervised_loss(step), **trainer.unsupervised_loss(step)}
    expected = {"supervised", "pseudo", "cross", "displaced"}
    assert set(terms) == expected | {f"second_{name}" for name in expected}
    for name, term in terms.items():
        for module in (unwrap(trainer.network), trainer.second):
            module.zero_grad(set_to_none=True)
        term.backward(retain_graph=True)
        own, other = (trainer.second, trainer.network) if "second" in name else (trainer.network, trainer.second)
        assert any(p.grad is not None and p.grad.any() for p in own.parameters())
        assert all(p.grad is None for p in other.parameters())
        assert all(p.grad is None for p in trainer.teacher.parameters())


def test_the_teacher_follows_the_first_student_and_rests_with_decay_one(make):
    data, trainer = make(ema_decay=1.0)
    before = [p.clone() for p in trainer.teacher.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, unwrap(trainer.network).parameters(), strict=True))
    trainer.train_step(data.batch(0))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.teacher.parameters(), strict=True))


def test_both_views_are_mixed_alike_and_labels_stay(make):
    data, trainer = make()
    batch = data.batch(0)
    labels = batch["target"][0].clone()
    step = trainer.make_step(batch)
    # the strong view shows the same numbers with another sign
    trainer.strong_view = lambda images: -images
    trainer.prepare_step(step)
    assert torch.equal(step.extra["strong"], -step.labeled)
    labeled = step.extra["is_labeled"][0]
    assert torch.equal(step.labeled, torch.where(labeled, batch["data"], batch["unlabeled"]))
    weak, strong = step.extra["unlabeled_views"]
    assert torch.equal(weak, batch["unlabeled"])
    assert torch.equal(strong, -weak)
    trainer.forward(step)
    trainer.unsupervised_loss(step)
    assert torch.equal(step.target[0], labels)


def test_students_label_displaced_patches_for_each_other(make, monkeypatch):
    data, trainer = make(cross_ramp=False)
    step = forwarded(trainer, data.batch(0), progress=0.0)
    shown = []
    monkeypatch.setattr(trainer, "displaced", lambda step, views, logits: shown.append(views) or torch.cat(views) + 1)
    terms = trainer.unsupervised_loss(step)
    x = torch.cat([step.labeled, step.extra["strong"]])
    assert torch.equal(torch.cat(shown[0]), x)
    first, second = (trainer.heads(network, x + 1)[0] for network in (trainer.network, trainer.second))

    def dice(logits, other):
        p, y = logits.softmax(1)[:, 1].flatten(1), other.argmax(1).flatten(1)
        return 1 - ((2 * (p * y).sum(1) + 1e-5) / (p.sum(1) + y.sum(1) + 1e-5)).mean()

    torch.testing.assert_close(terms["displaced"], dice(first, second))
    torch.testing.assert_close(terms["second_displaced"], dice(second, first))
    torch.testing.assert_close(terms["cross"], dice(step.heads[0], step.extra["second_heads"][0]))
    trainer.cross_ramp = True
    ramp = trainer.unsupervised_loss(step)["displaced"] / terms["displaced"]
    assert ramp.item() == pytest.approx(0.006738, rel=1e-3)


def test_one_displaced_view_of_each_patch(make):
    data, trainer = make(displaced_views="one")
    step = trainer.make_step(data.batch(0))
    step.progress = 1.0
    views = torch.zeros(2, 2, *data.patch), torch.ones(2, 2, *data.patch)
    result = trainer.displaced(step, views, (unsure_at(), unsure_at()))
    assert result.mean((1, 2, 3, 4)).tolist() == [0, 1]


def test_without_mixing(make):
    data, trainer = make(input_mix="none", pretrain_share=0.5)
    batch = data.batch(0)
    trainer.iteration = trainer.pretrain_steps
    step = forwarded(trainer, batch)
    assert torch.equal(step.images, torch.cat([batch["data"], batch["unlabeled"]]))
    assert torch.equal(trainer.supervised_loss(step), trainer.segmentation_loss(step.labeled_heads, step.target))
    names = {"supervised", "consistency", "cross", "displaced"}
    pairs = {f"second_{name}" for name in names}
    trainer.iteration = 0
    assert set(trainer.train_step(batch)) == {"loss", "supervised", "second_supervised"}
    trainer.train_step(batch)
    assert set(trainer.train_step(batch)) == names | pairs | {"loss", "replaced", "foreground_sources"}


def test_each_student_learns_from_the_teacher_s_view_of_its_own(make):
    data, trainer = make()
    step = forwarded(trainer, data.batch(0))
    # labels of the two views shall differ
    for parameter in trainer.teacher.parameters():
        parameter.normal_()
    terms = trainer.unsupervised_loss(step)
    for name, heads, view in zip(
        ("pseudo", "second_pseudo"),
        (step.heads, step.extra["second_heads"]),
        step.extra["unlabeled_views"],
        strict=True,
    ):
        torch.testing.assert_close(terms[name], trainer.pseudo_loss(step, heads, trainer.teacher(view)))


def test_without_mixing_students_are_drawn_to_the_teacher(make):
    data, trainer = make(input_mix="none")
    step = forwarded(trainer, data.batch(0), progress=0.5)
    for parameter in trainer.teacher.parameters():
        parameter.normal_()
    terms = trainer.unsupervised_loss(step)
    for name, heads, view in zip(
        ("consistency", "second_consistency"), (step.heads, step.extra["second_heads"]),
        step.extra["unlabeled_views"], strict=True,
    ):  # fmt: skip
        difference = (heads[0][2:].softmax(1) - trainer.teacher(view).softmax(1)).square().mean()
        torch.testing.assert_close(terms[name], 0.1 * 0.286505 * difference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("input_mix", ["bcp", "none"])
def test_a_first_phase_needs_no_unlabeled_patches(make, input_mix):
    data, trainer = make(pretrain_share=0.5, input_mix=input_mix)
    losses = trainer.train_step(data.batch(0) | {"unlabeled": None})
    assert set(losses) == {"loss", "supervised", "second_supervised"}
    assert losses["loss"].isfinite()


def test_confidence_of_regions(build):
    _, trainer = build("CAD", PAIRED | {"regions": True, "classes": 3})
    logits = torch.zeros(1, 2, 16, 16, 16)
    assert not trainer.confidence(logits).any()
    logits[:, 0] = 100
    assert (trainer.confidence(logits) == 0.5).all()


def test_what_predicts(make):
    _, trainer = make()
    assert trainer.deployed_network() is unwrap(trainer.network)
    trainer.deploy = "teacher"
    assert trainer.deployed_network() is trainer.teacher.network


def test_users_are_told_that_it_is_a_re_interpretation():
    (line,) = [line for line in table().splitlines() if line.startswith("CAD ")]
    assert line.endswith("re-interpretation")
    assert "status: re-interpretation" in describe("CAD").splitlines()[0]


@pytest.mark.parametrize(
    "setting",
    [
        {"threshold_start": -0.1},
        {"threshold_end": 0.4},
        {"edge_start": 0.0},
        {"edge_start": 0.5},
        {"source_candidates": 0},
        {"cross_weight": -1.0},
        {"consistency_weight": -1.0},
    ],
)
def test_unusable_values_are_refused(make, setting):
    with pytest.raises(UserError, match="unusable") as error:
        make(**setting)[1].check_settings()
    assert "--set" in str(error.value)
