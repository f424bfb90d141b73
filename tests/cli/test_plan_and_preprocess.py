from __future__ import annotations

import importlib
import io
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnssl.cli import run
from nnssl.utils.files import read_json
from nnssl.utils.paths import preprocessed_folder
from tests.preprocessing.raw_data import NAME, set_folders, write_dataset


@pytest.fixture
def raw_root(tmp_path, monkeypatch):
    return set_folders(tmp_path, monkeypatch)


def test_summary_and_next_command(raw_root, capsys):
    write_dataset(raw_root)
    assert run("plan_and_preprocess", ["-d", "801", "-pl", "nnSSLPlannerCPU", "-np", "1", "-npfp", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{NAME}: 2 labeled and 3 unlabeled cases" in lines
    assert any(
        "3d_fullres" in line and "2 labeled + 2 unlabeled" in line and "5 preprocessed" in line for line in lines
    )
    assert lines[-1] == "Next: nnssl_train 801 auto all -p nnSSLCPUPlans"
    assert not any("No CUDA" in line for line in lines)
    run("plan_and_preprocess", ["-d", NAME, "-pl", "nnSSLPlannerCPU", "-np", "1", "-npfp", "1", "-c", "2d"])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.strip().startswith("2d") and "0 preprocessed, 5 unchanged, 0 removed" in line for line in lines)
    assert any(line.strip().startswith("3d_fullres") and "not preprocessed" in line for line in lines)
    assert lines[-1] == "Next: nnssl_train 801 auto all -c 2d -p nnSSLCPUPlans"


def test_next_command_for_a_single_case(raw_root, capsys):
    write_dataset(raw_root, labeled=1, unlabeled=0)
    run("plan_and_preprocess", ["-d", "801", "-pl", "nnSSLPlannerCPU", "-npfp", "1", "--no_pp"])
    assert capsys.readouterr().out.splitlines()[-1] == "Next: nnssl_train 801 auto all -p nnSSLCPUPlans"


@pytest.mark.parametrize("cuda", [False, True])
def test_cpu_preset_is_recommended_without_cuda(raw_root, capsys, monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    write_dataset(raw_root, unlabeled=1)
    run("plan_and_preprocess", ["-d", "801", "--no_pp", "--skip_integrity_check", "-npfp", "1"])
    assert ("-pl nnSSLPlannerCPU" in capsys.readouterr().out) is not cuda


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-d", "801", "-pl", "Nothing"], "no planner Nothing"),
        (["-d", "802"], "no data set with id 802"),
        (["-d", "801", "-np", "1", "2"], "-np needs one number"),
        (["-d", "801", "-preprocessor_name", "Nothing"], "no preprocessor Nothing"),
    ],
)
def test_mistakes_are_told_without_traceback(raw_root, capsys, flags, message):
    write_dataset(raw_root, unlabeled=0)
    assert run("plan_and_preprocess", [*flags, "-npfp", "1"]) == 2
    assert message in capsys.readouterr().err


def test_broken_data_set_ends_with_code_2(raw_root, capsys):
    folder = write_dataset(raw_root)
    (folder / "imagesUn" / "u1_0000.nii.gz").write_text("broken")
    assert run("plan_and_preprocess", ["-d", "801", "-npfp", "1"]) == 2
    assert "u1" in capsys.readouterr().err


QUICK = ["-d", "801", "-pl", "nnSSLPlannerCPU", "-npfp", "1", "--no_pp", "--skip_integrity_check"]


def write_look_alikes(raw_root) -> None:
    """The two classes of the data set with the intensities of plain noise."""
    folder = write_dataset(raw_root, unlabeled=0)
    rng = np.random.default_rng(0)
    for file in sorted((folder / "imagesTr").iterdir()):
        image = sitk.ReadImage(str(file))
        noise = sitk.GetImageFromArray(rng.uniform(20, 60, image.GetSize()[::-1]).astype(np.float32))
        noise.CopyInformation(image)
        sitk.WriteImage(noise, str(file))


def test_where_labeled_cases_correspond_is_told(raw_root, capsys):
    write_dataset(raw_root, unlabeled=0)
    assert run("plan_and_preprocess", [*QUICK, "--align-atlases", "affine"]) == 0
    text = capsys.readouterr().out
    assert "Alignment of 2 labeled cases (affine)" in text
    assert "Labeled cases correspond in relative coordinates" in text
    assert "1 pair(s): 1.00 in relative coordinates (Dice 1.00, by chance 0.0" in text
    assert "in coordinates of the registration" in text
    assert "no common place" not in text


def planned_axes() -> dict[str, list[int]]:
    plans = read_json(preprocessed_folder() / NAME / "nnSSLCPUPlans.json")
    return {name: plan["semi_supervised"]["mirror_axes"] for name, plan in plans["configurations"].items()}


def test_mirrored_axes_and_what_decided_are_told(raw_root, capsys):
    write_look_alikes(raw_root)
    run("plan_and_preprocess", QUICK)
    text = capsys.readouterr().out
    assert "Mirrored axes: 2d none; 3d_fullres none" in text
    for axis in range(3):
        assert f"3d_fullres axis {axis} is not mirrored: bright and dim look alike (intensity overlap 0." in text
    assert text.count("keep their order in 2 of 2 labeled cases") == 3
    assert planned_axes() == {"2d": [], "3d_fullres": []}


@pytest.mark.parametrize(
    ("flag", "axes"),
    [
        ("all", {"2d": [0, 1], "3d_fullres": [0, 1, 2]}),
        # nnU-Net makes the reader's first axis, which has the largest spacing, the first of the patch
        ("1", {"2d": [0], "3d_fullres": [1]}),
        ("0,2", {"2d": [1], "3d_fullres": [0, 2]}),
    ],
)
def test_mirrored_axes_can_be_given(raw_root, capsys, flag, axes):
    write_look_alikes(raw_root)
    run("plan_and_preprocess", [*QUICK, "--mirror-axes", flag])
    assert "(as --mirror-axes says)" in capsys.readouterr().out
    assert planned_axes() == axes


def test_wrong_axes_are_told(raw_root, capsys):
    write_dataset(raw_root, unlabeled=0)
    assert run("plan_and_preprocess", [*QUICK, "--mirror-axes", "3"]) == 2
    assert "no axis 3" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("plan_and_preprocess", [*QUICK, "--mirror-axes", "0,x"])
    assert "not auto, all, none or a list of axes" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("flags", [[], ["--no_pbar"]])
def test_progress_bars_can_be_switched_off(raw_root, monkeypatch, flags):
    write_dataset(raw_root, unlabeled=1)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert run("plan_and_preprocess", ["-d", "801", "-pl", "nnSSLPlannerCPU", "-npfp", "1", "--no_pp", *flags]) == 0
    assert ("Fingerprint:" in terminal.getvalue()) is not bool(flags)


def test_numbers_of_workers(monkeypatch):
    # nnssl.cli holds a function of the same name, the entry point of the console script
    module = importlib.import_module("nnssl.cli.plan_and_preprocess")
    monkeypatch.setattr(module, "_cores", lambda: 6)
    names = ["2d", "3d_fullres", "3d_lowres", "mine"]
    assert module._workers(names, None) == {"2d": 6, "3d_fullres": 4, "3d_lowres": 6, "mine": 4}
    assert module._workers(names, [3]) == dict.fromkeys(names, 3)
    assert module._workers(["2d", "mine"], [1, 5]) == {"2d": 1, "mine": 5}


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom nnssl.cli import run\n"
        "try:\n    run('plan_and_preprocess', ['--help'])\n"
        "except SystemExit:\n    pass\n"
        "sys.exit('torch' in sys.modules or 'nnunetv2' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "-gpu_memory_target" in done.stdout


@pytest.mark.parametrize("text", ["x", "0", "1.5"])
def test_numbers_of_processes(capsys, text):
    with pytest.raises(SystemExit):
        run("plan_and_preprocess", ["-d", "801", "-np", text])
    assert f"argument -np: {text!r} is not a whole number from 1" in capsys.readouterr().err
