from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from nnssl.augmentation.regional_switch import RegionalSwitch
from nnssl.dataloading.atlas_pairs import AtlasPairsLoader
from nnssl.dataloading.correspondence import Correspondence, Frame
from nnssl.dataloading.rows import RowsLoader
from nnssl.dataloading.streams import SeededBatches, numpy_seeded

SHAPES = {"a": (30, 24, 20), "b": (15, 48, 20), "c": (30, 24, 40)}
ALWAYS = RegionalSwitch(probability=1.0)
NEVER = RegionalSwitch(0.0)


class Labels:
    """The facts about labels that nnU-Net's loader asks for."""

    all_labels = [0, 1, 2]  # noqa: RUF012
    has_ignore_label = False


class Annotated(Labels):
    has_ignore_label = True


class Cases:
    """Images that hold, in three channels, where each voxel is (relative, 0 to 1), and in a fourth the case."""

    def __init__(self, names="abc", shapes=None, previous: bool = False):
        self.shapes = shapes or SHAPES
        self.identifiers = list(names)
        self.previous = previous

    def load_case(self, identifier: str):
        shape = self.shapes[identifier]
        places = (np.indices(shape) + 0.5) / np.reshape(shape, (3, 1, 1, 1))
        number = ord(identifier) - ord("a") + 1
        image = np.concatenate([places, np.full((1, *shape), number)]).astype(np.float32)
        segmentation = np.full((1, *shape), number, np.int8)
        locations = {1: np.argwhere(places[:1] > 0.8), 2: np.argwhere(places[:1] < 0.1)}
        locations[(-1, 0, 1, 2)] = locations[1]
        previous = np.full(shape, 10 + number, np.int8) if self.previous else None
        return image, segmentation, previous, {"class_locations": locations}


def loader(batch_size=4, patch=(8, 8, 8), initial=None, cases=None, switch=ALWAYS, labels=Labels, **options):
    options = {"oversample_foreground_percent": 0.33, "correspondence": Correspondence(), **options}
    return AtlasPairsLoader(cases or Cases(), batch_size, initial or patch, patch, labels(), switch=switch, **options)


def batches(source, count: int = 12, seed: int = 0):
    stream = SeededBatches(source, "labeled", seed)
    return [stream[i] for i in range(count)]


def test_rows_of_a_pair_are_of_different_cases():
    names = Counter()
    for batch in batches(loader(), 30):
        keys = batch["keys"]
        assert keys[0] != keys[1]
        assert keys[2] != keys[3]
        names.update(keys)
    assert min(names.values()) > 25  # of 120


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8)])
def test_voxels_are_exchanged_between_the_rows_and_none_is_lost(patch):
    size = {"patch": patch, "initial": tuple(n + 4 for n in patch)}
    switched = batches(loader(**size))
    left = batches(loader(**size, switch=RegionalSwitch(0.0)))
    exchanged = 0
    for after, before in zip(switched, left, strict=True):
        assert list(after["keys"]) == list(before["keys"])
        for name in ("data", "target"):
            # the region is shared by the rows of a pair
            a, b = (batch[name].unflatten(0, (-1, 2)) for batch in (after, before))
            assert a.shape[-len(patch) :] == size["initial"]
            same = (a == b).all(1, keepdim=True)
            swapped = (a == b.flip(1)).all(1, keepdim=True)
            assert (same | swapped).all()
            exchanged += int((~same).sum())
            core = (..., *(slice(2, -2),) * len(patch))
            assert (~same).sum() == (~same[core]).sum()
        # the label is the number of the case, as is the last channel; outside of images both are padding
        image = after["data"][:, 3:]
        assert torch.equal(torch.where(image == 0, -1, image), after["target"].float())
    assert exchanged > 0


def centers(batch, shape=None) -> list[np.ndarray]:
    """Of each row, where the center of its patch lies in its case (relative), by what its voxels tell."""
    found = []
    for key, image in zip(batch["keys"], batch["data"].numpy(), strict=True):
        voxel = np.argwhere(image[3] > 0)[0]
        place = image[(slice(3), *voxel)]
        found.append(place + (np.array(image.shape[1:]) / 2 - 0.5 - voxel) / (shape or SHAPES[key]))
    return found


@pytest.mark.parametrize("forced", [0.0, 0.33, 1.0])
@pytest.mark.parametrize("patch", [(6, 6, 6), (24, 30, 22)])
def test_rows_lie_at_corresponding_positions(patch, forced):
    """Also where nnU-Net's patches on foreground reach out of the image, and in images smaller than the patch."""
    initial = tuple(n + 8 for n in patch)
    source = loader(4, patch, initial, switch=RegionalSwitch(0.0), oversample_foreground_percent=forced)
    moved = 0
    for batch in batches(source, 20):
        places = centers(batch)
        for (first, second), keys in zip((places[:2], places[2:]), (batch["keys"][:2], batch["keys"][2:]), strict=True):
            # half a voxel of the case with fewer of them
            assert (np.abs(first - second) <= 0.5 / np.min([SHAPES[key] for key in keys], 0) + 1e-6).all()
            moved += (np.abs(first - 0.5) > 0.1).any()
            # what the network will see of the row that leads lies within the image, or has it in the middle
            shape, edges = np.array(SHAPES[keys[1]]), np.array(patch)
            margin = np.maximum(edges - shape, 0)
            lower = second * shape - edges / 2
            assert (lower >= -margin - 0.5).all()
            assert (lower + edges <= shape + margin + 0.5).all()
    assert moved > 10 or patch[0] > 6


def test_positions_follow_the_frames():
    frames = {"a": Frame.of_box([(0, 0.5)] * 3), "b": Frame.of_box([(0.5, 1)] * 3), "c": Frame.of_box([(0, 0.5)] * 3)}
    cases = Cases("ab", {"a": (40, 40, 40), "b": (40, 40, 40)})
    options = {"correspondence": Correspondence(frames), "oversample_foreground_percent": 0.0}
    source = loader(2, (4, 4, 4), cases=cases, switch=RegionalSwitch(0.0), **options)
    within = 0
    for batch in batches(source, 60):
        a, b = (centers(batch, (40, 40, 40))[i] for i in np.argsort(batch["keys"]))
        # the center of the patch that follows stays within its case
        (clipped,) = np.nonzero((a > 0.5) | (b < 0.5))
        np.testing.assert_allclose(np.delete(b - a, clipped), 0.5, atol=0.02)
        assert a.min() >= 0
        assert b.max() <= 1
        within += 3 - len(clipped)
    assert within > 20


@pytest.mark.parametrize(("size", "asked", "expected"), [(2, 0.33, 0.5), (4, 0.33, 0.25), (2, 1.0, 1.0), (1, 1.0, 1.0)])
def test_pairs_show_foreground_as_often_as_nnunet_asks_of_their_rows(size, asked, expected):
    class Rarely(Cases):
        """Foreground at one end of the first axis, which uniform patches do not reach."""

        def load_case(self, identifier):
            *arrays, _ = super().load_case(identifier)
            return *arrays, {"class_locations": {1: np.argwhere(arrays[0][:1] > 0.99)}}

    shapes = dict.fromkeys("abc", (200, 8, 8))
    source = loader(size, (4, 4, 4), cases=Rarely(shapes=shapes), switch=NEVER, oversample_foreground_percent=asked)
    shown = np.array([(batch["data"][:, 0] > 0.99).flatten(1).any(1).tolist() for batch in batches(source, 80)])
    assert shown.mean() == pytest.approx(expected, abs=0.12 if expected < 1 else 0)
    if size > 1:
        assert (shown[:, 0::2] == shown[:, 1::2]).mean() > 0.95


def test_classes_are_centered_on_as_told():
    source = loader(2, (4, 4, 4), switch=NEVER)
    source.center_on(1.0, np.array([1.0, 0.0]), {1: ["a"], 2: ["b"]})
    for batch in batches(source):
        assert batch["keys"][1] == "a"
        assert batch["keys"][0] != "a"
        assert batch["data"][1, 0].max() > 0.8


def test_probabilistic_oversampling_is_drawn_once_for_a_pair():
    options = {"batch_size": 2, "patch": (4, 4, 4), "oversample_foreground_percent": 0.5}
    shown = []
    for batch in batches(loader(**options, switch=RegionalSwitch(0.0), probabilistic_oversampling=True), 40):
        places = batch["data"][:, 0]
        # foreground is near the ends of the first axis in all cases
        shown.append([bool(row.max() > 0.8 or row.min() < 0.1) for row in places])
    assert 0.35 < np.mean(shown) < 0.95
    assert np.mean([a == b for a, b in shown]) > 0.8


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4])
def test_each_row_can_be_made_alone(batch_size):
    whole = batches(loader(batch_size, switch=RegionalSwitch()), 8)
    for position in range(batch_size):
        alone = batches(loader(batch_size, switch=RegionalSwitch(), rows=range(position, position + 1)), 8)
        for a, b in zip(alone, whole, strict=True):
            assert a["keys"] == [b["keys"][position]]
            assert torch.equal(a["data"][0], b["data"][position])
            assert torch.equal(a["target"][0], b["target"][position])


def test_a_row_without_partner_is_switched_too():
    for size in (1, 3):
        last = [batch["data"][-1, 3].unique() for batch in batches(loader(size, (8, 8, 8)))]
        assert all(len(numbers[numbers > 0]) == 2 for numbers in last)


def test_half_of_the_pairs_are_switched():
    rows = torch.cat([batch["data"][:, 3] for batch in batches(loader(switch=RegionalSwitch()), 40)])
    switched = [len(row[row > 0].unique()) > 1 for row in rows]
    assert 0.35 < np.mean(switched) < 0.65


def test_transforms_come_after_the_switch():
    seen = []

    def transforms(image, segmentation):
        seen.append(segmentation.unique())
        return {"image": image, "segmentation": [segmentation, segmentation[:, ::2, ::2, ::2]]}

    batch = batches(loader(transforms=transforms), 1)[0]
    assert all(len(labels[labels > 0]) == 2 for labels in seen)
    full, half = batch["target"]
    assert torch.equal(half, full[:, :, ::2, ::2, ::2])


def test_a_slice_that_follows_is_one_of_its_case():
    frames = {"a": Frame.of_box([(0, 0.5)] * 3), "b": Frame.of_box([(0.5, 1)] * 3)}
    cases = Cases("ab", {"a": (7, 9, 9), "b": (8, 9, 9)})
    options = {"correspondence": Correspondence(frames), "oversample_foreground_percent": 0.0}
    for batch in batches(loader(2, (4, 4), cases=cases, switch=RegionalSwitch(0.0), **options), 60):
        assert (batch["data"][:, 3] > 0).flatten(1).any(1).all()


def test_patches_larger_than_the_images_are_padded():
    shapes = {"a": (6, 10, 8), "b": (9, 6, 10)}
    cases = Cases("ab", shapes)
    source = loader(2, (12, 12, 12), (14, 14, 14), cases, RegionalSwitch(0.0), oversample_foreground_percent=0.0)
    for batch in batches(source, 10):
        for key, image, label in zip(batch["keys"], batch["data"], batch["target"], strict=True):
            assert int((image[3] > 0).sum()) == np.prod(shapes[key])
            assert torch.equal(label[0] > 0, image[3] > 0)


def test_the_labels_of_an_earlier_stage_are_switched_along():
    for batch in batches(loader(2, cases=Cases(previous=True))):
        labels, before = batch["target"][:, 0], batch["target"][:, 1]
        assert torch.equal(before[labels > 0], labels[labels > 0] + 10)


def test_an_ignore_label_keeps_patches_on_annotated_voxels():
    source = loader(2, (4, 4, 4), labels=Annotated, oversample_foreground_percent=0.0, switch=RegionalSwitch(0.0))
    assert all(batch["data"][1, 0].max() > 0.8 for batch in batches(source))


def test_one_case_makes_no_pair_and_the_loader_can_be_sent_to_workers():
    with pytest.raises(ValueError, match="two cases"):
        loader(cases=Cases("a"))
    again = pickle.loads(pickle.dumps(loader()))
    assert torch.equal(batches(again, 1)[0]["data"], batches(loader(), 1)[0]["data"])


def test_rows_without_the_switch_are_those_of_before():
    options = {"oversample_foreground_percent": 0.33}
    cases = [RowsLoader(Cases(), 4, (8, 8, 8), (8, 8, 8), Labels(), **options) for _ in range(2)]
    cases[1].rows = range(2, 4)
    cases[1].batch_size = 2
    with numpy_seeded(3):
        drawn = cases[0].get_indices()
    with numpy_seeded(3):
        assert cases[1].get_indices() == drawn[2:]
