from __future__ import annotations

import json

import pytest

from nnssl.dataset.groups import group_cases, groups_from_regex, load_groups, name_some, read_groups, source_groups
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError

from .synthetic import make_raw


def test_cases_of_a_group_stand_together():
    groups = {"c": "p1", "a": "p1", "b": "p2"}
    assert group_cases(["d", "c", "b", "a"], groups) == [["a", "c"], ["b"], ["d"]]
    assert group_cases(["b", "a"], None) == [["a"], ["b"]]


def test_a_group_named_like_an_ungrouped_case_is_another_unit():
    assert group_cases(["x", "y"], {"y": "x"}) == [["x"], ["y"]]


def test_regex():
    assert groups_from_regex(["010_HC", "010_2HC", "test_010_HC"], r"(.*?)_\d*HC") == {
        "010_HC": "010",
        "010_2HC": "010",
        "test_010_HC": "test_010",
    }


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"patient\d+", "has no group"),
        (r"(patient", "invalid regular expression"),
        (r"(\d+)_frame", "does not match every case"),
        # matched at the start: elsewhere it would put test_010 and 010 into one group
        (r"(\d)", "does not match every case"),
        (r"patient(\d?)", "does not match every case"),
    ],
)
def test_regex_errors(pattern, message):
    with pytest.raises(UserError, match=message):
        groups_from_regex(["patient1_frame1", "patientX_frame1"], pattern)


def test_file_of_the_data_set(tmp_path):
    folder = make_raw(tmp_path / "Dataset001_X")
    assert load_groups(RawDataset.open(folder)) is None
    (folder / "groups.json").write_text(json.dumps({"lab_0": "p", "unl_1": "p", "tst_0": 7}))
    assert load_groups(RawDataset.open(folder)) == {"lab_0": "p", "unl_1": "p", "tst_0": "7"}
    (folder / "groups.json").write_text(json.dumps({"lab_0": "p", "lab_00": "p"}))
    with pytest.raises(UserError, match=r"(?s)do not exist.*lab_00"):
        load_groups(RawDataset.open(folder))


@pytest.mark.parametrize("content", [["a"], {"a": ["p"]}])
def test_file_of_another_shape(tmp_path, content):
    (tmp_path / "g.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="not an object"):
        read_groups(tmp_path / "g.json", ["a"])


def test_a_pattern_or_a_named_file_comes_before_the_file_of_the_folder(tmp_path):
    (tmp_path / "groups.json").write_text('{"a1": "own"}')
    (tmp_path / "named.json").write_text('{"a1": "named"}')
    assert source_groups(tmp_path, ["a1"]) == {"a1": "own"}
    assert source_groups(tmp_path, ["a1"], tmp_path / "named.json") == {"a1": "named"}
    assert source_groups(tmp_path, ["a1"], None, r"([a-z])") == {"a1": "a"}


def test_a_file_may_name_cases_that_are_left_out(tmp_path):
    (tmp_path / "groups.json").write_text('{"a1": "a", "a2": "a", "b1": "b"}')
    assert source_groups(tmp_path, ["a1", "b1"], left_out=["a2"]) == {"a1": "a", "b1": "b"}
    # a pattern need not match them
    assert source_groups(tmp_path, ["a1"], None, r"([a-z])", left_out=["0"]) == {"a1": "a"}
    with pytest.raises(UserError, match=r"(?s)do not exist.*b1"):
        source_groups(tmp_path, ["a1"], left_out=["a2"])


def test_name_some():
    assert name_some("abc") == "a, b, c"
    assert name_some("abcdef", limit=2) == "a, b and 4 more"
