from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl.cli import run
from nnssl.cli.predict import main
from tests.inference.model_folders import change_checkpoint, read_mask, write_model, write_scan

QUICK = ["-npp", "0", "-nps", "0", "-device", "cpu", "--precision", "fp32", "--disable_progress_bar"]


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return tmp_path / "results"


@pytest.fixture
def scans(tmp_path) -> Path:
    for number, name in enumerate("ab"):
        write_scan(tmp_path / "in" / f"{name}_0000.nii.gz", seed=number)
    return tmp_path / "in"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def predict(*flags: object) -> int:
    return run("predict", [str(flag) for flag in [*flags, *QUICK]])


def test_a_folder(results, scans, tmp_path, capsys):
    write_model(results, folds=(0, 1))
    assert predict("-i", scans, "-o", tmp_path / "out", "-d", 901) == 0
    assert sorted(file.name for file in (tmp_path / "out").glob("*.nii.gz")) == ["a.nii.gz", "b.nii.gz"]
    printed = capsys.readouterr().out
    assert "nnUNetTrainer__nnSSLPlans__3d_fullres, folds 0 1 (checkpoint_final.pth)" in printed
    assert "2 cases written" in printed
    assert "s per case" in printed


def test_a_model_folder_and_one_fold(results, scans, tmp_path):
    model = write_model(results, folds=(0, 1))
    assert predict("-i", scans / "a_0000.nii.gz", "-o", tmp_path / "one", "-m", model, "-f", 1) == 0
    assert predict("-i", scans / "a_0000.nii.gz", "-o", tmp_path / "both", "-m", model) == 0
    masks = [read_mask(tmp_path / folder / "a.nii.gz") for folder in ("one", "both")]
    assert masks[0].shape == (20, 16, 14)
    assert not np.array_equal(*masks)


def test_flags_reach_the_prediction(results, scans, tmp_path):
    model = write_model(results)
    write_scan(scans / "a_0000.nii.gz", shape=(30, 16, 16))
    common = ["-i", scans, "-m", model, "-num_parts", 2, "--save_probabilities"]
    for name, flags in (("out", []), ("plain", ["--disable_tta"]), ("far", ["-step_size", 1])):
        assert predict(*common, "-o", tmp_path / name, *flags) == 0
        assert sorted(file.name for file in (tmp_path / name).glob("[ab].*")) == ["a.nii.gz", "a.npz", "a.pkl"]
    found = {name: np.load(tmp_path / name / "a.npz")["probabilities"] for name in ("out", "plain", "far")}
    assert not np.array_equal(found["out"], found["plain"])
    assert not np.array_equal(found["out"], found["far"])


def test_continue(results, scans, tmp_path, capsys):
    model = write_model(results)
    predict("-i", scans, "-o", tmp_path / "out", "-m", model)
    (tmp_path / "out" / "a.nii.gz").unlink()
    capsys.readouterr()
    assert predict("-i", scans, "-o", tmp_path / "out", "-m", model, "--continue_prediction") == 0
    assert "1 case written" in capsys.readouterr().out


def test_without_cuda_a_sentence_says_so(results, scans, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = write_model(results)
    flags = ["-i", scans, "-o", tmp_path / "out", "-m", model, "-npp", 0, "-nps", 0]
    assert run("predict", [str(flag) for flag in flags]) == 0
    assert "the CPU, since there is no CUDA device" in capsys.readouterr().out


def test_mistakes_end_with_code_2_and_no_traceback(results, scans, tmp_path, capsys):
    model = write_model(results, folds=(0, 1))
    out = tmp_path / "out"
    for flags, message in (
        (["-d", 902], "no data set with id 902"),
        (["-d", 901, "-tr", "MeanTeacher"], "no trained model with trainer MeanTeacher"),
        (["-m", tmp_path / "nothing"], "model folder not found"),
        (["-m", model, "-f", 4], "in fold 4"),
        (["-m", model, "-chk", "checkpoint_best.pth"], "no fold of the model has checkpoint_best.pth"),
        (["-m", model, "-step_size", 2], "-step_size"),
        (["-m", model, "-num_parts", 2, "-part_id", 2], "-part_id"),
    ):
        assert predict("-i", scans, "-o", out, *flags) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_malicious_checkpoint_is_refused(results, scans, tmp_path, capsys):
    model = write_model(results)
    change_checkpoint(model, logging=Payload(tmp_path / "trace"))
    assert predict("-i", scans, "-o", tmp_path / "out", "-m", model) == 2
    assert "--trust_checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    assert predict("-i", scans, "-o", tmp_path / "out", "-m", model, "--trust_checkpoint") == 0
    assert (tmp_path / "trace").exists()


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (_write, (str(self.target),))


def _write(target: str) -> str:
    Path(target).write_text("code was run")
    return target


@pytest.mark.parametrize(
    "flags",
    [
        ["-i", "in", "-o", "out"],
        ["-i", "in", "-o", "out", "-d", "1", "-m", "folder"],
        ["-i", "in", "-o", "out", "-m", "folder", "-tr", "A"],
        ["-i", "in", "-o", "out", "-d", "1", "-device", "cuda:1"],
    ],
)
def test_flags_that_do_not_go_together(flags):
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2


def test_processes_from_the_environment(monkeypatch):
    from nnssl.cli.predict import _parser

    monkeypatch.setenv("nnUNet_npp", "5")
    monkeypatch.setenv("nnUNet_nps", "")
    args = _parser().parse_args(["-i", "in", "-o", "out", "-d", "1"])
    assert (args.npp, args.nps) == (5, None)


def test_help_loads_nothing_heavy():
    command = (
        "import sys\nfrom nnssl.cli.predict import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'numpy', 'nnunetv2') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert "--continue_prediction" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
