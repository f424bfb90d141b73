"""A disk that is full, folders that cannot be written to, variables that are not set, names that are not plain."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch

from nnssl.utils import files
from nnssl.utils.disk import disk_errors_named, told_system_error
from tests.robustness.place import PLAN, PLANS, PREDICT, TRAIN, TRAIN_NEXT, VARIABLES, Place


def _refused(place: Place, capsys: pytest.CaptureFixture[str], command: str) -> str:
    """Message of a command that is refused with exit code 2, and leaves what was finished as it was."""
    before = {name: content for name, content in place.contents().items() if _is_work(name)}
    capsys.readouterr()
    assert place.run(command) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    after = place.contents()
    assert {name: after.get(name) for name in before} == before
    assert not [name for name in after if ".tmp_" in name]
    return captured.err


def _is_work(name: str) -> bool:
    return name.startswith(("nnUNet_raw", "nnUNet_results", "scans")) or name.endswith((".b2nd", ".pkl"))


def _refuse_writing(monkeypatch: pytest.MonkeyPatch, number: int, part: str) -> None:
    """Flushing any file whose path holds ``part`` to the disk fails with an error of the operating system."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if part in path:
            raise OSError(number, os.strerror(number), path)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EROFS, "the file system is read-only"),
        (errno.EACCES, "permission denied"),
        (errno.EIO, "the disk reports an error"),
    ],
)
@pytest.mark.parametrize(
    ("command", "part"),
    [
        (PLAN, "content.json"),
        (PLAN, "splits_final.json"),
        (PLAN + " --clean", "manifests/"),
        (TRAIN_NEXT, "checkpoint_"),
        (TRAIN_NEXT, "run.json"),
        (TRAIN_NEXT, "curves.csv"),
        (PREDICT, "plans.json"),
    ],
)
def test_what_the_system_refuses_is_told(place, capsys, monkeypatch, number, sentence, command, part):
    if part == "content.json":
        (place.base / "manifests" / part).unlink()
    if part == "splits_final.json":
        (place.base / part).unlink()
    if command.endswith("--clean"):
        # which makes everything anew, so that what it removed is not to be kept
        shutil.rmtree(place.cases)
        shutil.rmtree(place.base / f"{PLANS}_3d_fullres_unlabeled")
    _refuse_writing(monkeypatch, number, part)
    message = _refused(place, capsys, command)
    assert sentence in message
    assert part in message
    assert "to do" in message


def test_a_folder_that_cannot_be_made(place, capsys):
    """A file is in the way, which stops root, too."""
    (place.root / "results").write_text("")
    place.monkeypatch.setenv("nnUNet_results", str(place.root / "results"))
    message = _refused(place, capsys, TRAIN)
    assert "in the place of a folder" in message


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("command", [PLAN, TRAIN, PREDICT])
def test_variables_that_are_not_set(place, capsys, monkeypatch, variable, command):
    needed = {PLAN: VARIABLES[:2], TRAIN: VARIABLES[1:], PREDICT: VARIABLES[2:]}[command]
    monkeypatch.delenv(variable)
    if variable not in needed:
        pytest.skip("the command does not need it")
    message = _refused(place, capsys, command)
    assert f"variable {variable} is not set" in message
    assert f"export {variable}=" in message


@pytest.mark.slow
def test_names_with_spaces_and_letters_of_all_kinds(place, capsys):
    for case, name in (("l0", "Zoë 左 (1)"), ("u0", "ünlabeled 'x'")):
        for channel in (0, 1):
            file = place.image(case, channel)
            file.rename(file.with_name(f"{name}_{channel:04d}.nii.gz"))
        if case == "l0":
            place.label().rename(place.label().with_name(f"{name}.nii.gz"))
    (place.base / "splits_final.json").unlink()
    assert place.run(PLAN) == 0
    assert place.run(TRAIN.replace("Supervised 0", "MeanTeacher 0")) == 0
    assert (place.cases / "Zoë 左 (1).b2nd").is_file()


def test_every_error_of_the_system_is_found_behind_others():
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/x")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 (as torch does)
    except RuntimeError as error:
        told = told_system_error(error)
    assert told is not None
    assert str(told).startswith("the disk is full")
    assert "/data/x" in str(told)
    assert told_system_error(RuntimeError("unexpected pos 704 vs 598")) is None
    assert told_system_error(FileNotFoundError(errno.ENOENT, "No such file")) is None


def test_a_real_full_device(monkeypatch):
    """What torch says of it is 'unexpected pos'; through a file of Python's the reason is known."""
    with pytest.raises(OSError, match="No space left") as caught, open("/dev/full", "wb") as file:
        torch.save({"a": torch.zeros(1_000_000)}, file)
    assert str(told_system_error(caught.value)).startswith("the disk is full")


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path, monkeypatch):
    file = tmp_path / "checkpoint_latest.pth"
    torch.save({"a": torch.ones(3)}, file)
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"), files.atomic_path(file) as temporary:
        torch.save({"a": torch.zeros(9)}, temporary)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


_SMALL_FILES = """
import resource, signal, sys
from nnssl.cli import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(run(sys.argv[2], sys.argv[3:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "command"),
    [(20_000, PLAN + " --clean"), (20_000, TRAIN_NEXT), (40, PREDICT)],
    ids=["preprocessing", "training", "prediction"],
)
def test_files_that_the_system_cuts_off(place, limit, command):
    """A limit to the size of files, which compressors, torch and SimpleITK meet as they meet a full disk."""
    before = place.contents()
    words = command.format(root=place.root).split()
    result = subprocess.run(
        [sys.executable, "-c", _SMALL_FILES, str(limit), *words], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "file would become larger" in result.stderr or "File too large" in result.stderr
    after = place.contents()
    for name in before:
        if name.startswith(("nnUNet_raw", "nnUNet_results")):
            assert after[name] == before[name]
    assert not [name for name in after if name.startswith("masks") and name.endswith(".nii.gz")]
    assert not list((place.root / "nnUNet_results").rglob("fold_1/checkpoint_final.pth"))


def test_writers_without_reasons_are_asked_for_one(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match="as it was"), disk_errors_named(tmp_path):
        raise RuntimeError("as it was")
    _refuse_writing(monkeypatch, errno.ENOSPC, str(tmp_path))
    with pytest.raises(OSError, match="No space"), disk_errors_named(tmp_path):
        raise RuntimeError("Error while creating the NDarray")
