from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from nnssl.errors import UserError
from nnssl.utils.files import atomic_folder_path, atomic_path, read_json, write_json
from nnssl.utils.paths import dataset_name
from nnssl.utils.plain import plain


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "result.json"
    file.write_text("old")

    def write_half() -> None:
        with atomic_path(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_the_temporary_name_keeps_the_ending(tmp_path):
    with atomic_path(tmp_path / "new" / "mask.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        temporary.write_bytes(b"x")
    assert (tmp_path / "new" / "mask.nii.gz").read_bytes() == b"x"


def test_files_beside_a_file_are_moved_with_it(tmp_path):
    with atomic_folder_path(tmp_path / "new" / "mask.tif") as temporary:
        temporary.write_text("mask")
        temporary.with_suffix(".json").write_text("spacing")
        assert not (tmp_path / "new" / "mask.json").exists()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["mask.json", "mask.tif"]

    def write_half() -> None:
        with atomic_folder_path(tmp_path / "new" / "mask.tif") as temporary:
            temporary.with_suffix(".json").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["mask.json", "mask.tif"]
    assert (tmp_path / "new" / "mask.json").read_text() == "spacing"


def test_json_takes_numpy_sets_and_paths(tmp_path):
    write_json({"a": np.float32(0.5), "b": np.arange(2), "c": {3}, "d": tmp_path}, tmp_path / "x.json")
    assert read_json(tmp_path / "x.json") == {"a": 0.5, "b": [0, 1], "c": [3], "d": str(tmp_path)}


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="object"):
        write_json({"a": object()}, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("content", [None, "{", "\xff"])
def test_missing_and_broken_json_are_user_errors(tmp_path, content):
    file = tmp_path / "plans.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        read_json(file, fix="plan again")
    assert error.value.where == file
    assert "plan again" in str(error.value)


@pytest.mark.parametrize("text", ["4", 4, "004", "Dataset004_Heart"])
def test_data_sets_are_found_by_id_or_name(nnunet_folders, text):
    (nnunet_folders / "nnUNet_raw" / "Dataset004_Heart").mkdir()
    (nnunet_folders / "nnUNet_results" / "Dataset004_Heart").mkdir()
    assert dataset_name(text) == "Dataset004_Heart"


@pytest.mark.parametrize(("text", "message"), [("5", "no data set with id 5"), ("Heart", "not a data set")])
def test_unknown_data_sets_are_user_errors(nnunet_folders, text, message):
    with pytest.raises(UserError, match=message):
        dataset_name(text)


def test_two_data_sets_of_one_id_are_named(nnunet_folders):
    for name in ("Dataset004_Heart", "Dataset004_Liver"):
        (nnunet_folders / "nnUNet_raw" / name).mkdir()
    with pytest.raises(UserError, match="more than one") as error:
        dataset_name(4)
    assert "Heart" in error.value.found
    assert "Liver" in error.value.found


def test_plain_containers_can_be_read_back_without_running_code(tmp_path):
    content = {"dice": [np.float64(0.5), np.int32(3)], "axes": (0, np.int64(1)), "array": np.eye(2), "path": tmp_path}
    torch.save(plain(content), tmp_path / "x.pth")
    back = torch.load(tmp_path / "x.pth", weights_only=True)
    assert back["dice"] == [0.5, 3]
    assert back["axes"] == (0, 1)
    assert torch.equal(back["array"], torch.eye(2, dtype=torch.float64))
    assert json.loads(json.dumps(back["path"])) == str(tmp_path)
