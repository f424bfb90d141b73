from __future__ import annotations

import json
import random

import numpy as np
import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnssl.dataset.raw import RawDataset
from nnssl.dataset.splits import Fold, ensure_splits, load_fold, make_splits
from nnssl.errors import UserError

from .synthetic import make_raw


def cases(count: int, prefix: str = "case") -> list[str]:
    return [f"{prefix}_{index:02d}" for index in range(count)]


@pytest.mark.parametrize("count", [5, 6, 11, 30])
def test_identical_to_nnunet(count):
    shuffled = cases(count)
    random.Random(count).shuffle(shuffled)
    expected = generate_crossval_split(list(np.sort(shuffled)), seed=12345, n_splits=5)
    assert make_splits(shuffled, cases(3, "u")) == expected


def test_groups_of_one_case_change_nothing():
    groups = {case: f"patient_{case}" for case in cases(9)}
    assert make_splits(cases(9), [], groups) == make_splits(cases(9), [])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_cases_leave_one_out(count):
    splits = make_splits(cases(count), cases(3, "u"))
    assert sorted(split["val"] for split in splits) == [[case] for case in cases(count)]
    assert all(sorted(split["train"] + split["val"]) == cases(count) for split in splits)
    assert all("unlabeled" not in split for split in splits)


@pytest.mark.parametrize("count", [0, 1])
def test_one_case_has_no_folds(count):
    assert make_splits(cases(count), cases(3, "u")) == []


@pytest.mark.parametrize("seed", range(10))
def test_groups_never_straddle(seed):
    generator = random.Random(seed)
    labeled, unlabeled = cases(generator.randint(2, 30)), cases(20, "u")
    groups = {case: f"p{generator.randint(0, 8)}" for case in [*labeled, *unlabeled] if generator.random() < 0.8}
    number = len({groups.get(case, case) for case in labeled})
    splits = make_splits(labeled, unlabeled, groups)
    assert len(splits) == (min(5, number) if number > 1 else 0)
    assert sorted(case for split in splits for case in split["val"]) == (labeled if splits else [])
    for split in splits:
        assert sorted(split["train"] + split["val"]) == labeled
        held_out = {groups[case] for case in split["val"] if case in groups}
        seen = [*split["train"], *split.get("unlabeled", unlabeled)]
        assert not held_out & {groups[case] for case in seen if case in groups}
        # nothing is left out without need, and the list is written only when something is
        kept = [case for case in unlabeled if groups.get(case) not in held_out]
        assert split.get("unlabeled", unlabeled) == kept
        assert ("unlabeled" in split) == (kept != unlabeled)


def test_splits_are_plain_json():
    splits = make_splits(cases(6), [])
    assert json.loads(json.dumps(splits)) == splits


@pytest.fixture
def splits_file(tmp_path):
    path = tmp_path / "splits_final.json"
    path.write_text(
        json.dumps([{"train": ["a", "b"], "val": ["c"]}, {"train": ["b", "c"], "val": ["a"], "unlabeled": ["u"]}])
    )
    return path


@pytest.mark.parametrize(
    ("fold", "expected"),
    [
        (0, Fold(["a", "b"], ["c"], ["u", "v"])),
        ("1", Fold(["b", "c"], ["a"], ["u"])),
        ("all", Fold(["a", "b", "c"], ["a", "b", "c"], ["u", "v"])),
    ],
)
def test_load_fold(splits_file, fold, expected):
    assert load_fold(splits_file, fold, ["c", "a", "b"], ["v", "u"]) == expected


def test_fold_all_needs_no_file(tmp_path):
    assert load_fold(tmp_path / "none.json", "all", ["a"], []) == Fold(["a"], ["a"], [])


@pytest.mark.parametrize("fold", [2, "7"])
def test_unknown_fold_lists_the_folds(splits_file, fold):
    with pytest.raises(UserError, match=rf"(?s)there is no fold {fold}.*0, 1, all"):
        load_fold(splits_file, fold, ["a", "b", "c"], [])


@pytest.mark.parametrize("fold", ["first", -1, "1.5"])
def test_no_fold(splits_file, fold):
    with pytest.raises(UserError, match="not a fold"):
        load_fold(splits_file, fold, ["a", "b", "c"], [])


@pytest.mark.parametrize(("labeled", "fix"), [(["a"], "use fold all"), (["a", "b"], "nnssl_plan_and_preprocess")])
def test_no_file(tmp_path, labeled, fix):
    with pytest.raises(UserError, match=fix):
        load_fold(tmp_path / "splits_final.json", 0, labeled, [])


def test_cases_of_one_group_have_no_folds_and_the_error_says_why(raw_folder, tmp_path):
    labeled = ["lab_0", "lab_1", "lab_2"]
    told = ensure(raw_folder, tmp_path, dict.fromkeys(labeled, "p"))
    assert "train with fold all" in told[0]
    with pytest.raises(UserError, match=r"(?s)patient leaves none to validate on.*use fold all"):
        load_fold(tmp_path / "preprocessed" / "splits_final.json", 0, labeled, [])


INVALID = {
    "not JSON": ("[", "not valid JSON"),
    "object": ({"train": ["a"], "val": ["b"]}, "not a list"),
    "no val": ([{"train": ["a"]}], "lacks its lists"),
    "text": ([{"train": "a", "val": ["b"]}], "lacks its lists"),
    "numbers": ([{"train": [1], "val": ["b"]}], "lacks its lists"),
    "unlabeled is no list": ([{"train": ["a"], "val": ["b"], "unlabeled": None}], "lacks its lists"),
    "unknown train": ([{"train": ["a", "x"], "val": ["b"]}], 'under "train" that are not labeled'),
    "unlabeled val": ([{"train": ["a"], "val": ["u"]}], 'under "val" that are not labeled'),
    "labeled unlabeled": ([{"train": ["a"], "val": ["b"], "unlabeled": ["c"]}], "that are not unlabeled"),
    "overlap": ([{"train": ["a", "b"], "val": ["b"]}], "validates on training cases"),
    "repeated": ([{"train": ["a", "a"], "val": ["b"]}], "repeats cases"),
    "no training": ([{"train": [], "val": ["b"]}], '"train" of the fold is empty'),
    "no validation": ([{"train": ["a"], "val": []}], '"val" of the fold is empty'),
}


@pytest.mark.parametrize(("content", "message"), INVALID.values(), ids=INVALID)
def test_invalid_files(splits_file, content, message):
    splits_file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        load_fold(splits_file, 0, ["a", "b", "c"], ["u"])
    assert message in str(error.value)
    assert str(splits_file) in str(error.value)


@pytest.fixture
def raw_folder(tmp_path):
    return make_raw(tmp_path / "raw" / "Dataset001_X", labeled=3)


def ensure(raw_folder, tmp_path, groups=None):
    return ensure_splits(RawDataset.open(raw_folder), tmp_path / "preprocessed", groups)


def written(tmp_path):
    return json.loads((tmp_path / "preprocessed" / "splits_final.json").read_text())


def test_ensure_makes_and_keeps(raw_folder, tmp_path):
    told = ensure(raw_folder, tmp_path)
    assert written(tmp_path) == make_splits(["lab_0", "lab_1", "lab_2"], [])
    assert told[0].startswith("Made 3 folds (one case or group left out per fold)")
    own = [{"train": ["lab_0"], "val": ["lab_1", "lab_2"], "comment": "mine"}]
    (tmp_path / "preprocessed" / "splits_final.json").write_text(json.dumps(own))
    assert "are used (1)" in ensure(raw_folder, tmp_path)[0]
    assert written(tmp_path) == own


def test_ensure_reads_groups(raw_folder, tmp_path):
    (raw_folder / "groups.json").write_text(json.dumps({"lab_0": "p", "lab_1": "p", "unl_0": "p"}))
    ensure(raw_folder, tmp_path)
    assert {"train": ["lab_2"], "val": ["lab_0", "lab_1"], "unlabeled": ["unl_1"]} in written(tmp_path)


def test_ensure_copies_the_file_of_the_raw_folder(raw_folder, tmp_path):
    given = [{"train": ["lab_0", "lab_1"], "val": ["lab_2"]}]
    (raw_folder / "splits_final.json").write_text(json.dumps(given))
    ensure(raw_folder, tmp_path)
    assert written(tmp_path) == given
    # as in nnU-Net, the preprocessed folder may have further folds
    more = [*given, {"train": ["lab_2"], "val": ["lab_0"]}]
    (tmp_path / "preprocessed" / "splits_final.json").write_text(json.dumps(more))
    ensure(raw_folder, tmp_path)
    (tmp_path / "preprocessed" / "splits_final.json").write_text(json.dumps(more[::-1]))
    with pytest.raises(UserError, match="hold different folds"):
        ensure(raw_folder, tmp_path)


def test_ensure_refuses_an_invalid_raw_file_and_writes_nothing(raw_folder, tmp_path):
    (raw_folder / "splits_final.json").write_text(json.dumps([{"train": ["lab_0"], "val": ["ghost"]}]))
    with pytest.raises(UserError, match="ghost"):
        ensure(raw_folder, tmp_path)
    assert not (tmp_path / "preprocessed").exists()


def test_ensure_with_one_labeled_case(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X", labeled=1)
    assert "fold all" in ensure(folder, tmp_path)[0]
    assert not (tmp_path / "preprocessed").exists()


def test_ensure_tells_added_cases(raw_folder, tmp_path):
    ensure(raw_folder, tmp_path)
    for part in ("imagesUn/unl_0_0000", "imagesUn/unl_1_0000"):
        (raw_folder / f"{part}.nii.gz").rename(raw_folder / "imagesTr" / f"{part.split('/')[1]}.nii.gz")
    told = ensure(raw_folder, tmp_path)
    assert any(text.startswith("2 labeled case(s) are in no fold: unl_0, unl_1;") for text in told)


def test_ensure_tells_unlabeled_cases_in_no_list(raw_folder, tmp_path):
    splits = [{"train": ["lab_0", "lab_1"], "val": ["lab_2"], "unlabeled": ["unl_0"]}]
    (raw_folder / "splits_final.json").write_text(json.dumps(splits))
    assert any('1 unlabeled case(s) are in no "unlabeled" list: unl_1' in text for text in ensure(raw_folder, tmp_path))


@pytest.mark.parametrize("together", [("lab_0", "lab_2"), ("unl_0", "lab_2")])
def test_ensure_refuses_a_file_that_splits_a_group(raw_folder, tmp_path, together):
    (raw_folder / "splits_final.json").write_text(json.dumps([{"train": ["lab_0", "lab_1"], "val": ["lab_2"]}]))
    with pytest.raises(UserError, match=rf"(?s)groups \(patients\).*{together[0]}"):
        ensure(raw_folder, tmp_path, dict.fromkeys(together, "p"))
