"""The long tests, ``make soak``: processes that are killed at random moments, and a training with 5,000 cases.

Environment variables make them shorter: ``NNSSL_SOAK_KILLS`` (20), ``NNSSL_SOAK_CASES`` (5000), ``NNSSL_SOAK_EPOCHS``
(200).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnssl.inference.checkpoint import read_model_checkpoint
from tests.preprocessing.raw_data import NAME
from tests.robustness.place import PLAN, PLANS, PREDICT, VARIABLES, Place
from tests.support.tiny import PLANS as TINY_PLANS
from tests.support.tiny import Tiny

pytestmark = pytest.mark.soak

KILLS = int(os.environ.get("NNSSL_SOAK_KILLS", "20"))
CASES = int(os.environ.get("NNSSL_SOAK_CASES", "5000"))
EPOCHS = int(os.environ.get("NNSSL_SOAK_EPOCHS", "200"))
SCANS = 4


@pytest.fixture(scope="module")
def pristine(shared_place: Place) -> Path:
    for number in range(1, SCANS):
        for channel in (0, 1):
            scan = shared_place.root / "scans" / f"s_{channel:04d}.nii.gz"
            shutil.copy(scan, scan.with_name(f"s{number}_{channel:04d}.nii.gz"))
    return shared_place.root


def _start(root: Path, command: str) -> subprocess.Popen[bytes]:
    """Of nnU-Net's folders those below ``root`` are used, and those of the environment where it has none."""
    here = {variable: str(root / variable) for variable in VARIABLES if (root / variable).is_dir()}
    environment = os.environ | here
    words = shlex.split(command.format(root=root))
    with open(root / "output.txt", "ab") as output:
        # a group of its own, so that its workers can be ended with it
        return subprocess.Popen(
            [sys.executable, "-m", "nnssl", *words],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _finish(root: Path, command: str) -> float:
    """Seconds that the command takes to its end, which has to be a good one."""
    began = time.monotonic()
    code = _start(root, command).wait(timeout=900)
    assert code == 0, (root / "output.txt").read_text(errors="replace")[-3000:]
    return time.monotonic() - began


def _kill_after(root: Path, command: str, seconds: float, done: Callable[[], bool] = lambda: False) -> bool:
    """Kills the main process after so many seconds, or when ``done``, and leaves its workers to themselves.

    False if it had ended before.
    """
    process = _start(root, command)
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end and not done():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    code = process.wait(timeout=60)
    assert code in (0, -signal.SIGKILL), (root / "output.txt").read_text(errors="replace")[-3000:]
    return code != 0


def _stamps(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """Inode and time of change of finished files, which differ if a file is made again."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob(pattern)
        if ".tmp_" not in str(path)
    }


def _arrays(folder: Path) -> dict[str, str]:
    import blosc2

    return {
        str(path.relative_to(folder)): hashlib.md5(np.ascontiguousarray(blosc2.open(str(path))[:]).data).hexdigest()
        for path in sorted(folder.rglob("*.b2nd"))
    }


def _preprocessed(root: Path) -> Path:
    return root / "nnUNet_preprocessed" / NAME


def _weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    (file,) = (root / "nnUNet_results").glob(f"*/{name}__*/fold_all/checkpoint_final.pth")
    content = read_model_checkpoint(file)
    states = {"network": content["network_weights"], **content["semi_supervised"]["modules"]}
    return {f"{part}.{key}": value.clone() for part, state in states.items() for key, value in state.items()}


def test_preprocessing_is_killed_and_goes_on(pristine, tmp_path):
    command = PLAN.replace("-np 1", "-np 2")
    shutil.copytree(pristine, tmp_path / "whole")
    shutil.rmtree(_preprocessed(tmp_path / "whole"))
    seconds = _finish(tmp_path / "whole", command)
    expected = _arrays(_preprocessed(tmp_path / "whole"))
    moments = random.Random(0)
    done = 0
    while done < KILLS:
        root = tmp_path / str(done)
        shutil.copytree(pristine, root)
        shutil.rmtree(_preprocessed(root))
        done += _kill_after(root, command, moments.uniform(0.1, 1.0) * seconds)
        recorded = _recorded(_preprocessed(root))
        before = {name: stamp for name, stamp in _stamps(_preprocessed(root), "*.b2nd").items() if name in recorded}
        _finish(root, command)
        after = _stamps(_preprocessed(root), "*.b2nd")
        assert {name: after[name] for name in before} == before, "a finished case was made twice"
        assert _arrays(_preprocessed(root)) == expected
        assert not list(root.rglob(".tmp_*"))
        assert not list(root.rglob("*.journal"))
        shutil.rmtree(root)


def _recorded(base: Path) -> set[str]:
    """Files of the cases that manifests and journals call finished."""
    names = set()
    folders = {"": base / f"{PLANS}_3d_fullres", "_unlabeled": base / f"{PLANS}_3d_fullres_unlabeled"}
    for file in (
        *base.rglob("*.journal"),
        *base.glob("manifests/nnSSL*.json"),
        *base.glob("*_unlabeled/manifest.json"),
    ):
        folder = folders["_unlabeled" if file.parent.name.endswith("_unlabeled") else ""]
        if file.suffix == ".journal":
            entries = [json.loads(line)["entry"] for line in file.read_text().splitlines() if line.endswith("}}")]
        else:
            entries = list(json.loads(file.read_text())["cases"].values())
        names |= {str((folder / name).relative_to(base)) for entry in entries for name in entry["files"]}
    return names


@pytest.mark.parametrize("name", ["Supervised", "MeanTeacher", "SelfTraining"])
def test_training_is_killed_and_goes_on(name, tmp_path, monkeypatch):
    """Self-training works on whole cases between its rounds; half of its kills come while it does."""
    data = Tiny(labeled=2, unlabeled=16).write(tmp_path / "data", monkeypatch)
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    flags = "-device cpu --epochs 45 --iterations-per-epoch 2 --seed 5 --deterministic --disable_memory_check"
    command = f"train 901 {name} all -p {TINY_PLANS} {flags}"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    results = killed / "nnUNet_results"
    for root in (whole, killed):
        (root / "nnUNet_results").mkdir(parents=True)
    seconds = _finish(whole, command)
    expected = _weights(whole, name)
    moments = random.Random(name)
    done = late = within = 0
    kept: dict[str, tuple[int, int]] = {}
    while done < KILLS:
        fresh = not list(results.glob(f"*/{name}__*/fold_all/checkpoint_latest.pth"))
        before = set(_stamps(results, "*.b2nd"))
        half_labeled = lambda before=before: 4 < len(set(_stamps(results, "*.b2nd")) - before) < 12  # noqa: E731
        wait_for_labels = name == "SelfTraining" and done % 2 == 1
        moment = 3 * seconds if wait_for_labels else moments.uniform(0.1, 1.0) * seconds
        was_killed = _kill_after(killed, f"{command} --c", moment, half_labeled if wait_for_labels else lambda: False)
        found = _stamps(results, "*.b2nd")
        # a training without checkpoint starts again, and predicts again
        if not fresh:
            assert not {file for file in kept if file in found and found[file] != kept[file]}
        kept = found
        there = {file.name for file in results.glob(f"*/{name}__*/fold_all/checkpoint_*.pth")}
        ended = "checkpoint_final.pth" in there
        if was_killed:
            done += 1
            late += bool(there & {"checkpoint_latest.pth", "checkpoint_final.pth"})
            within += 0 < len(set(found) - before) < data.unlabeled
        if ended:
            assert _same(_weights(killed, name), expected)
            shutil.rmtree(results)
            results.mkdir()
            kept = {}
    _finish(killed, f"{command} --c")
    assert _same(_weights(killed, name), expected)
    assert not list(results.rglob(".tmp_*"))
    print(f"{name}: {done} kills, {late} after a checkpoint, {within} between two pseudo-labels")
    assert late >= KILLS // 4, "too few kills hit a training that had something to lose"
    if name == "SelfTraining":
        assert within >= KILLS // 4


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_prediction_is_killed_and_goes_on(pristine, tmp_path):
    shutil.copytree(pristine, tmp_path / "whole")
    seconds = _finish(tmp_path / "whole", PREDICT)
    moments = random.Random(1)
    done = 0
    while done < KILLS:
        root = tmp_path / str(done)
        shutil.copytree(pristine, root)
        done += _kill_after(root, PREDICT, moments.uniform(0.1, 1.0) * seconds)
        masks = root / "masks"
        before = _stamps(masks, "*.nii.gz") if masks.is_dir() else {}
        before = {name: stamp for name, stamp in before.items() if "/" not in name}
        _finish(root, PREDICT + " --continue_prediction")
        after = _stamps(masks, "*.nii.gz")
        assert {name: after[name] for name in before} == before, "a finished case was predicted twice"
        assert sorted(after) == sorted(path.name for path in (tmp_path / "whole" / "masks").glob("*.nii.gz"))
        assert len(after) == SCANS
        for name in after:
            assert (masks / name).read_bytes() == (tmp_path / "whole" / "masks" / name).read_bytes()
        shutil.rmtree(root)


def test_resources_stay_flat_with_thousands_of_cases(tmp_path, monkeypatch, capsys):
    """Memory of all processes, open files, shared memory and disk, each epoch, while patches of all cases are cut."""
    data = Tiny(unlabeled=1).write(tmp_path / "data", monkeypatch)
    folder = data.base / f"{data.identifier}_unlabeled"
    for number in range(1, CASES):
        for ending in (".b2nd", "_mask.b2nd"):
            (folder / f"unlabeled_{number}{ending}").symlink_to(folder / f"unlabeled_0{ending}")
    flags = f"-device cpu --epochs {EPOCHS} --iterations-per-epoch 25 --seed 0 --disable_memory_check"
    command = [sys.executable, "-m", "nnssl", *f"train 901 MeanTeacher all -p {TINY_PLANS} {flags}".split()]
    process = subprocess.Popen(
        command, env=os.environ | {"nnUNet_n_proc_DA": "2"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    rows = []
    for line in process.stdout:
        if line.startswith("epoch "):
            rows.append(_resources(process.pid, tmp_path / "data" / "nnUNet_results"))
    assert process.wait(timeout=120) == 0
    # the last epoch may end together with the process
    rows = [row for row in rows[:-1] if row]
    assert len(rows) >= EPOCHS // 2
    quarters = [rows[len(rows) * part // 4 : len(rows) * (part + 1) // 4] for part in range(4)]
    early, late = ({key: statistics.median(row[key] for row in quarters[part]) for key in rows[0]} for part in (1, 3))
    peaks = [max(row["memory_mb"] for row in quarter) for quarter in quarters]
    with capsys.disabled():
        print(f"\n{CASES} cases, {EPOCHS} epochs; medians of the second and of the last quarter, and peaks of memory:")
        print(json.dumps(early), json.dumps(late), peaks, sep="\n")
    assert late["open_files"] <= early["open_files"] + 2
    assert late["processes"] == early["processes"]
    assert 0 < late["shared_mb"] <= early["shared_mb"] + 8
    # log and curves grow by a line per epoch, and there are about 20 pictures; the rest is written in place
    assert late["disk_mb"] <= early["disk_mb"] + 3 + EPOCHS * 0.02
    assert late["memory_mb"] <= 1.05 * early["memory_mb"] + 20
    # while a plot or a picture is drawn, which is about as often in each quarter, but not always seen
    assert max(peaks) <= 1.6 * early["memory_mb"]


def _resources(main: int, results: Path) -> dict[str, Any]:
    """Sums over a process and its children; empty if one of them ended meanwhile."""
    try:
        children = Path(f"/proc/{main}/task/{main}/children").read_text().split()
        numbers = [str(main), *children]
        memory = sum(_kilobytes(number, "Pss:") for number in numbers)
        # of batches on their way from the workers
        shared = sum(_kilobytes(number, "Pss_Shmem:") for number in numbers)
        files = sum(len(os.listdir(f"/proc/{number}/fd")) for number in numbers)
    except OSError:
        return {}
    disk = sum(path.stat().st_size for path in results.rglob("*") if path.is_file() and ".tmp_" not in path.name)
    return {
        "processes": len(numbers),
        "memory_mb": round(memory / 1024),
        "open_files": files,
        "shared_mb": round(shared / 1024, 1),
        "disk_mb": round(disk / 2**20, 2),
    }


def _kilobytes(number: str, name: str) -> int:
    lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
