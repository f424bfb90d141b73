from __future__ import annotations

import itertools

import pytest
import torch

from nnssl.augmentation.symmetries import (
    Symmetry,
    apply_each,
    resized_content,
    resizing_keeps,
    symmetries,
    undo_each,
)

CUBE = symmetries((4, 4, 4), (1, 1, 1), (0, 1, 2))
SQUARE = symmetries((4, 4), (1, 1), (0, 1))


def patch(dimensions: int, edge: int = 4) -> torch.Tensor:
    shape = (2, *(edge,) * dimensions)
    return torch.arange(2 * edge**dimensions).reshape(shape).float()


@pytest.mark.parametrize("group", [CUBE, SQUARE], ids=["cube", "square"])
def test_every_element_is_undone_to_the_bit(group):
    x = patch(len(group[0].order))
    for element in group:
        assert torch.equal(element.undo(element.apply(x)), x)
        assert torch.equal(element.apply(element.undo(x)), x)


@pytest.mark.parametrize("group", [CUBE, SQUARE], ids=["cube", "square"])
def test_elements_differ_and_form_a_group(group):
    x = patch(len(group[0].order))
    images = {tuple(element.apply(x).flatten().tolist()) for element in group}
    assert len(images) == len(group)
    for a, b in itertools.product(group[::5], group[::3]):
        assert tuple(b.apply(a.apply(x)).flatten().tolist()) in images


def test_quarter_turns_and_flips_are_in_the_group():
    x = patch(3)
    images = [element.apply(x) for element in CUBE]
    for turns, plane in itertools.product((1, 2, 3), ((1, 2), (1, 3), (2, 3))):
        assert any(torch.equal(torch.rot90(x, turns, plane), image) for image in images)
    for axis in (1, 2, 3):
        assert any(torch.equal(x.flip(axis), image) for image in images)
    assert torch.equal(images[0], x), "the identity is the first"


def test_axes_are_exchanged_only_with_equal_edges_and_spacings():
    assert {s.order for s in symmetries((4, 6, 6), (1, 1, 1), (0, 1, 2))} == {(0, 1, 2), (0, 2, 1)}
    assert {s.order for s in symmetries((6, 6, 6), (3, 0.5, 0.5), (0, 1, 2))} == {(0, 1, 2), (0, 2, 1)}
    assert {s.order for s in symmetries((4, 6), (1, 1), (0, 1))} == {(0, 1)}
    assert len(symmetries((6, 6), (1.0, 1.001), (0, 1))) == 8


def test_axes_that_are_not_mirrored_stay_as_they_are():
    group = symmetries((4, 4, 4), (1, 1, 1), (1, 2))
    assert len(group) == 8
    assert all(s.order[0] == 0 and 0 not in s.flipped for s in group)
    # a turn in a plane with such an axis would reverse it
    assert symmetries((4, 4), (1, 1), (1,)) == [Symmetry((0, 1)), Symmetry((0, 1), (1,))]
    assert symmetries((4, 4), (1, 1), ()) == [Symmetry((0, 1))]


def test_each_patch_gets_its_own():
    group = [CUBE[7], CUBE[40]]
    x = torch.stack([patch(3), patch(3) + 500])
    y = apply_each(group, x)
    assert torch.equal(y[0], CUBE[7].apply(x[0]))
    assert torch.equal(y[1], CUBE[40].apply(x[1]))
    assert torch.equal(undo_each(group, y), x)
    with pytest.raises(ValueError, match="longer"):
        apply_each(group[:1], x)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_factor_one_changes_nothing(dimensions):
    x = patch(dimensions, 6)[None]
    torch.testing.assert_close(resized_content(x, torch.ones(1)), x)
    assert resizing_keeps(x.shape[2:], torch.ones(1)).all()


def test_content_grows_about_the_center():
    x = torch.zeros(1, 1, 9, 9)
    x[..., 3:6, 3:6] = 1
    grown = resized_content(x, torch.tensor([2.0]))
    assert grown[0, 0, 4].tolist() == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.5, 0], abs=1e-5)
    shrunk = resized_content(x, torch.tensor([0.5]))
    assert shrunk[0, 0, 4].tolist() == pytest.approx([0, 0, 0, 0, 1, 0, 0, 0, 0], abs=1e-5)


@pytest.mark.parametrize("factor", [0.9, 1.1])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_resizing_is_undone_where_the_patch_was_kept(dimensions, factor):
    # a linear function is interpolated without error
    axes = torch.meshgrid(*[torch.linspace(0, 1, 20)] * dimensions, indexing="ij")
    x = sum((i + 1) * axis for i, axis in enumerate(axes))[None, None]
    factors = torch.tensor([factor])
    back = resized_content(resized_content(x, factors), 1 / factors)
    known = resizing_keeps(x.shape[2:], factors)
    assert known.shape == (1, 1, *(20,) * dimensions)
    torch.testing.assert_close(back[known], x[known], rtol=0, atol=5e-3)
    assert (back - x).abs()[~known].max() > 0.05
    inner = (slice(None), slice(None), *(slice(2, -2),) * dimensions)
    assert known[inner].all(), "only the rim is lost"
    assert not known.all()


def test_factors_are_those_of_each_patch():
    x = torch.rand((2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    both = resized_content(x, torch.tensor([0.9, 1.1]))
    torch.testing.assert_close(both[1:], resized_content(x[1:], torch.tensor([1.1])))
    torch.testing.assert_close(both[:1], resized_content(x[:1], torch.tensor([0.9])))
