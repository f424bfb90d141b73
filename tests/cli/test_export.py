from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from nnssl.cli import run
from nnssl.cli.export import main
from nnssl.ext_trainer import shim_folder
from tests.inference.model_folders import write_model


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    return tmp_path / "results"


def export(*flags: object) -> int:
    return run("export", [str(flag) for flag in flags])


def test_a_folder(results, tmp_path, capsys):
    write_model(results, folds=(0, 2))
    assert export("-d", 901, "-o", tmp_path / "out") == 0
    assert (tmp_path / "out" / "fold_2" / "checkpoint_final.pth").is_file()
    assert (
        f"nnUNetv2_predict_from_modelfolder -i INPUT -o OUTPUT -m {tmp_path / 'out'} -f 0 2" in capsys.readouterr().out
    )


def test_a_zip_file(results, tmp_path, capsys):
    model = write_model(results, folds=("all",))
    assert export("-m", model, "-o", tmp_path / "model.zip", "--zip") == 0
    assert "nnUNetv2_install_pretrained_model_from_zip" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        inside = "Dataset901_Tiny/nnUNetTrainer__nnSSLPlans__3d_fullres"
        assert set(archive.namelist()) == {
            f"{inside}/{name}"
            for name in ("plans.json", "dataset.json", "dataset_fingerprint.json", "fold_all/checkpoint_final.pth")
        }


def test_mistakes_end_with_code_2(results, tmp_path, capsys):
    write_model(results)
    assert export("-d", 901, "-c", "2d", "-o", tmp_path / "out") == 2
    assert "no trained model with configuration 2d" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    assert export("-d", 901, "-o", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err


def test_the_shim_folder_is_all_that_is_printed(capsys):
    assert export("--shim") == 0
    printed = capsys.readouterr().out
    assert printed == f"{shim_folder()}\n"
    assert (Path(printed.strip()) / "nnssl_trainers.py").is_file()


@pytest.mark.parametrize("flags", [[], ["-d", "1"], ["-m", "folder", "-p", "A", "-o", "out"], ["-d", "1", "--shim"]])
def test_flags_that_do_not_go_together(flags):
    with pytest.raises(SystemExit) as caught:
        main(flags)
    assert caught.value.code == 2
