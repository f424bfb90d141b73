from __future__ import annotations

import blosc2
import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl.dataloading import pseudo_labeled
from nnssl.dataloading.cases import UnlabeledCases
from nnssl.dataloading.pseudo_labeled import PseudoLabeledCases, PseudoLabeledLoader, PseudoLabels

CLASSES = LabelManager({"background": 0, "a": 1, "b": 2, "ignore": 3}, None)
REGIONS = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
SHAPE = (12, 14, 16)


@pytest.fixture
def labels():
    array = np.zeros((1, *SHAPE), np.int16)
    array[0, 8, 9, 10:13] = 1
    array[0, 8, 9, 13] = 2
    array[0, 0] = -1
    return array


@pytest.fixture
def cases(tmp_path, labels):
    """One case, whose image holds the pseudo-label in its first and numbered voxels in its second channel."""
    image = np.stack([labels[0].astype(np.float32), np.arange(labels.size, dtype=np.float32).reshape(SHAPE)])
    blosc2.asarray(image, urlpath=str(tmp_path / "case.b2nd"))
    store = PseudoLabels(tmp_path / "round_0")
    store.write("case", labels, CLASSES, (8, 8, 8))
    return PseudoLabeledCases(UnlabeledCases(tmp_path, ["case"]), store, ["case"])


def test_what_is_written_is_read(tmp_path, labels):
    store = PseudoLabels(tmp_path / "new")
    assert "case" not in store
    store.write("case", labels, CLASSES, (8, 8, 8), {"foreground": 4})
    assert "case" in store
    assert [p.name for p in store.folder.iterdir()] == ["case.b2nd"]
    read = store.labels("case")
    assert read.dtype == np.int8
    assert np.array_equal(read[:], labels)
    assert store.facts("case") == {"foreground": 4}


def test_box_around_the_foreground(tmp_path, labels):
    store = PseudoLabels(tmp_path)
    labels[0, 2, 2, 2:4] = 1  # half of the other component
    store.write("two", labels, CLASSES, (8, 8, 8))
    assert store.box("two") == [[2 / 12, 9 / 12], [2 / 14, 10 / 14], [2 / 16, 14 / 16]]


def test_files_of_earlier_versions_have_no_box(tmp_path, labels):
    store = PseudoLabels(tmp_path)
    store.write("case", labels, CLASSES, (8, 8, 8))
    expected = store.box("case")
    file = blosc2.open(str(tmp_path / "case.b2nd"), mode="a")
    del file.schunk.vlmeta["foreground_box"]
    assert store.box("case") == expected


def test_labels_above_127_are_kept(tmp_path, labels):
    store = PseudoLabels(tmp_path)
    labels[0, 5, 5, 5] = 200
    store.write("case", labels, CLASSES, (8, 8))
    assert np.array_equal(store.labels("case")[:], labels)


@pytest.mark.parametrize(
    ("manager", "expected"),
    [(CLASSES, {1: [10, 11, 12], 2: [13]}), (REGIONS, {(1, 2): [10, 11, 12, 13], 2: [13]})],
    ids=["classes", "regions"],
)
def test_every_class_or_region_is_located(tmp_path, labels, manager, expected):
    store = PseudoLabels(tmp_path)
    store.write("case", labels, manager, (8, 8, 8))
    located = store.class_locations(store.labels("case"))
    assert {key: sorted(voxels[:, 3].tolist()) for key, voxels in located.items()} == expected
    assert all((voxels[:, :3] == (0, 8, 9)).all() for voxels in located.values())


def test_a_class_that_is_not_predicted_has_no_location(tmp_path, labels):
    store = PseudoLabels(tmp_path)
    store.write("case", np.zeros_like(labels), CLASSES, (8, 8, 8))
    located = store.class_locations(store.labels("case"))
    assert {key: voxels.shape for key, voxels in located.items()} == {1: (0, 4), 2: (0, 4)}


def test_a_write_that_fails_leaves_nothing(tmp_path, labels, monkeypatch):
    store = PseudoLabels(tmp_path)

    def full(array, urlpath, **options):
        with open(urlpath, "wb") as stream:
            stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pseudo_labeled.blosc2, "asarray", full)
    with pytest.raises(OSError, match="No space"):
        store.write("case", labels, CLASSES, (8, 8, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8)], ids=["3D", "2D"])
def test_patches_show_the_foreground_and_the_labels_of_their_place(cases, patch):
    np.random.seed(0)
    loader = PseudoLabeledLoader(
        cases, 6, patch, patch, CLASSES, oversample_foreground_percent=0.5, transforms=ComposeTransforms([])
    )
    batch = loader.generate_train_batch()
    assert batch["data"].shape == (6, 2, *patch)
    assert batch["target"].shape == (6, 1, *patch)
    assert batch["keys"] == ["case"] * 6
    # outside the image patches are padded with 0, their labels with -1
    inside = batch["target"] >= 0
    assert torch.equal(batch["target"][inside].float(), batch["data"][:, :1][inside])
    assert all((patch > 0).any() for patch in batch["target"][3:])
    assert not all((patch > 0).any() for patch in batch["target"][:3])
