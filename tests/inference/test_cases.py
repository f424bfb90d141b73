from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from skimage import io

from nnssl.errors import UserError
from nnssl.inference.cases import InputCase, collect_cases, previous_stage_files
from tests.inference.model_folders import write_scan


def collect(*inputs: Path, channels: int = 1, ending: str = ".nii.gz", reader: str = "SimpleITKIO") -> list[InputCase]:
    return collect_cases(inputs, file_ending=ending, channels=channels, reader=reader)


def fill(folder: Path, *names: str, shape=(4, 4, 4)) -> Path:
    for name in names:
        write_scan(folder / name, shape=shape)
    return folder


def found(cases: list[InputCase]) -> dict[str, list[str]]:
    return {case.name: [file.name for file in case.files] for case in cases}


def test_names_of_nnunet(tmp_path):
    fill(tmp_path, "b_0000.nii.gz", "b_0001.nii.gz", "a_0001.nii.gz", "a_0000.nii.gz")
    assert found(collect(tmp_path, channels=2)) == {
        "a": ["a_0000.nii.gz", "a_0001.nii.gz"],
        "b": ["b_0000.nii.gz", "b_0001.nii.gz"],
    }


def test_names_without_channel(tmp_path):
    fill(tmp_path, "b.nii.gz", "a.nii.gz")
    assert found(collect(tmp_path)) == {"a": ["a.nii.gz"], "b": ["b.nii.gz"]}


def test_numbered_cases_without_channel(tmp_path):
    fill(tmp_path, "scan_0001.nii.gz", "scan_0002.nii.gz")
    assert list(found(collect(tmp_path))) == ["scan_0001", "scan_0002"]


def test_single_files(tmp_path):
    fill(tmp_path, "a_0000.nii.gz", "b.nii.gz")
    assert found(collect(tmp_path / "a_0000.nii.gz")) == {"a": ["a_0000.nii.gz"]}
    assert found(collect(tmp_path / "b.nii.gz")) == {"b": ["b.nii.gz"]}
    fill(tmp_path, "a_0001.nii.gz")
    pair = collect(tmp_path / "a_0001.nii.gz", tmp_path / "a_0000.nii.gz", channels=2)
    assert found(pair) == {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}


def test_hidden_and_foreign_files_are_no_scans(tmp_path):
    fill(tmp_path, "a_0000.nii.gz")
    (tmp_path / "._a_0000.nii.gz").write_text("of macOS")
    (tmp_path / "notes.txt").write_text("notes")
    assert list(found(collect(tmp_path))) == ["a"]


def test_all_channels_in_one_file(tmp_path):
    image = sitk.JoinSeries([sitk.Image(4, 5, 6, sitk.sitkFloat32)] * 2)
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    assert list(found(collect(tmp_path, channels=2))) == ["a"]


def test_rgb_pictures(tmp_path):
    for name in ("a.png", "b.png"):
        io.imsave(tmp_path / name, np.zeros((8, 9, 3), np.uint8), check_contrast=False)
    assert list(found(collect(tmp_path, channels=3, ending=".png", reader="NaturalImage2DIO"))) == ["a", "b"]
    with pytest.raises(UserError, match="case a: 3 channels"):
        collect(fill_png(tmp_path / "named"), channels=1, ending=".png", reader="NaturalImage2DIO")


def fill_png(folder: Path) -> Path:
    folder.mkdir()
    io.imsave(folder / "a_0000.png", np.zeros((8, 9, 3), np.uint8), check_contrast=False)
    return folder


@pytest.mark.parametrize("reader", ["SimpleITKIO", "NibabelIO"])
def test_readers_of_nifti(tmp_path, reader):
    fill(tmp_path, "a_0000.nii.gz")
    assert list(found(collect(tmp_path, reader=reader))) == ["a"]
    (tmp_path / "a_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be read"):
        collect(tmp_path, reader=reader)


@pytest.mark.parametrize(
    ("names", "channels", "message"),
    [
        ([], 1, "an empty folder"),
        (["a_0000.nii.gz", "b_0000.nii.gz", "b_0001.nii.gz"], 2, "case a: 1 channel in a_0000.nii.gz"),
        (["a_0001.nii.gz"], 2, "case a: 1 channel in a_0001.nii.gz"),
        (["a_0000.nii.gz", "a_0002.nii.gz"], 2, "case a: 2 channels in a_0000.nii.gz, a_0002.nii.gz"),
        (["a_0000.nii.gz", "a_0001.nii.gz"], 1, "case a: 2 channels"),
        (["a_0001.nii.gz", "b_0001.nii.gz"], 1, "case a: 1 channel in a_0001.nii.gz"),
        (["a.nii.gz"], 2, "the model has 2 channels"),
        (["a_0000.nii.gz", "b.nii.gz"], 1, "beside names that have it"),
        (["a_0000.nii.gz", "b_0000.nii"], 1, "another file ending"),
        (["a_0000.nrrd"], 1, "a_0000.nrrd"),
    ],
)
def test_input_that_does_not_fit(tmp_path, names, channels, message):
    fill(tmp_path, *names)
    with pytest.raises(UserError) as caught:
        collect(tmp_path, channels=channels)
    assert message in str(caught.value)


def test_scans_in_subfolders_are_mentioned(tmp_path):
    fill(tmp_path / "patient", "a_0000.nii.gz")
    with pytest.raises(UserError, match="1 subfolders"):
        collect(tmp_path)


def test_unreadable_files_are_named(tmp_path):
    fill(tmp_path, "a_0000.nii.gz", "b_0000.nii.gz")
    (tmp_path / "b_0000.nii.gz").write_bytes(b"no image")
    (tmp_path / "c_0000.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match="2 of 3 images") as caught:
        collect(tmp_path)
    assert "b_0000.nii.gz" in str(caught.value)
    assert "c_0000.nii.gz" in str(caught.value)
    assert "a_0000.nii.gz" not in str(caught.value)


def test_links_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "in").mkdir()
    fill(tmp_path / "elsewhere", "a_0000.nii.gz")
    for name in "ab":
        (tmp_path / "in" / f"{name}_0000.nii.gz").symlink_to(tmp_path / "elsewhere" / f"{name}_0000.nii.gz")
    (tmp_path / "in" / "notes").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="1 of 2 images cannot be read") as caught:
        collect(tmp_path / "in")
    assert f"b_0000.nii.gz: a link to {tmp_path / 'elsewhere' / 'b_0000.nii.gz'}, which does not" in str(caught.value)
    with pytest.raises(UserError, match="input not found") as caught:
        collect(tmp_path / "in" / "b_0000.nii.gz")
    assert "a link to" in str(caught.value)
    fill(tmp_path / "elsewhere", "b_0000.nii.gz")
    assert list(found(collect(tmp_path / "in"))) == ["a", "b"]


@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
@pytest.mark.parametrize("share", [0.5, 0.999])
def test_files_that_are_cut_off(tmp_path, ending, share):
    file = write_scan(tmp_path / f"a_0000{ending}", shape=(20, 20, 20))
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=f"a_0000{ending}: the file is cut off"):
        collect(tmp_path, ending=ending)


def test_channels_of_different_size(tmp_path):
    fill(tmp_path, "a_0000.nii.gz")
    fill(tmp_path, "a_0001.nii.gz", shape=(4, 4, 5))
    with pytest.raises(UserError, match="channels of different size") as caught:
        collect(tmp_path, channels=2)
    assert "a_0001.nii.gz (4, 4, 5)" in str(caught.value)


def test_input_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="input not found"):
        collect(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match="wrong file ending"):
        collect(tmp_path / "a.txt")
    with pytest.raises(UserError, match="no input"):
        collect()


def test_the_same_case_twice(tmp_path):
    fill(tmp_path / "x", "a_0000.nii.gz")
    fill(tmp_path / "y", "a_0000.nii.gz")
    with pytest.raises(UserError, match="two files for the same case"):
        collect(tmp_path / "x", tmp_path / "y")


def test_unknown_reader(tmp_path):
    fill(tmp_path, "a_0000.nii.gz")
    with pytest.raises(UserError, match="MyOwnIO"):
        collect(tmp_path, reader="MyOwnIO")


def test_masks_of_the_previous_stage(tmp_path):
    cases = [InputCase("a", ()), InputCase("b", ())]
    (tmp_path / "a.nii.gz").touch()
    with pytest.raises(UserError, match=r"b\.nii\.gz"):
        previous_stage_files(cases, tmp_path, file_ending=".nii.gz", stage="3d_lowres")
    with pytest.raises(UserError, match="-prev_stage_predictions"):
        previous_stage_files(cases, None, file_ending=".nii.gz", stage="3d_lowres")
    assert previous_stage_files(cases[:1], tmp_path, file_ending=".nii.gz", stage="x") == [tmp_path / "a.nii.gz"]
