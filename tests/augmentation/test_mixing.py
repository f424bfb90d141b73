import pytest
import torch

from nnssl.augmentation.mixing import pair_both_ways, partners


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "rows"),
    [
        (1, 1, ([0, 0], [0, 0])),
        (1, 2, ([0, 0], [0, 1])),
        (2, 1, ([0, 1], [0, 0])),
        (4, 4, ([0, 1, 2, 3], [0, 1, 2, 3])),
        (2, 3, ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2])),
        (4, 6, ([0, 0, 1, 2, 2, 3], [0, 1, 2, 3, 4, 5])),
    ],
)
def test_every_patch_is_used_and_both_directions_are_equally_many(labeled, unlabeled, rows):
    pairs = pair_both_ways(labeled, unlabeled)
    assert (pairs.labeled.tolist(), pairs.unlabeled.tolist()) == rows
    assert pairs.labeled_is_pasted.tolist() == [False, True] * (len(rows[0]) // 2)


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 2), (2, 4), (6, 2), (4, 6), (6, 6)])
def test_ranks_pair_as_one_process(labeled, unlabeled):
    whole = pair_both_ways(labeled, unlabeled)
    parts = [pair_both_ways(labeled // 2, unlabeled // 2, rank, 2) for rank in range(2)]
    assert torch.equal(torch.cat([p.labeled + i * labeled // 2 for i, p in enumerate(parts)]), whole.labeled)
    assert torch.equal(torch.cat([p.unlabeled + i * unlabeled // 2 for i, p in enumerate(parts)]), whole.unlabeled)
    assert torch.equal(torch.cat([p.labeled_is_pasted for p in parts]), whole.labeled_is_pasted)


def test_an_odd_number_is_doubled_on_all_ranks():
    parts = [pair_both_ways(1, 1, rank, 3) for rank in range(3)]
    assert [p.labeled_is_pasted.tolist() for p in parts] == [[False, True]] * 3


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="0 unlabeled"):
        pair_both_ways(2, 0)


def test_partners_are_exchanged_and_come_back():
    rows = torch.randn(6, 2, 3)
    assert torch.equal(partners(rows)[[1, 0, 5]], rows[[0, 1, 4]])
    assert torch.equal(partners(partners(rows)), rows)
