"""No training opens a label that is hidden from it, or a test case.

A process trains every registered method, with an audit hook that sees what Python opens; from outside, the system is
asked what anybody opened in the folders of what is hidden, the libraries that read images included.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nnssl.trainers.registry import registered_trainers
from tests.robustness.place import BUDGET, PLANS, VARIABLES, Place
from tests.support.opened import OpenedFiles

pytestmark = pytest.mark.slow

TRAINERS = sorted(registered_trainers())

PROGRAM = """
import contextlib, io, json, os, sys

opened = []

def hook(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        opened.append(os.fsdecode(os.fspath(arguments[0])))

sys.addaudithook(hook)
import blosc2
real_open = blosc2.open

def traced(urlpath, *arguments, **options):
    opened.append(os.fspath(urlpath))
    return real_open(urlpath, *arguments, **options)

blosc2.open = traced
from nnssl.cli import run
result = {}
for trainer in json.loads(sys.argv[1]):
    opened.clear()
    code = run("train", [word.replace("TRAINER", trainer) for word in json.loads(sys.argv[2])])
    result[trainer] = {"code": code, "opened": sorted(set(opened))}
    print("RESULT", json.dumps({trainer: result[trainer]}), flush=True)
"""


@pytest.fixture(scope="module")
def place(shared_place: Place) -> Place:
    """Hidden labels lie wherever a careless program might look for them."""
    place = shared_place
    for folder in ("labelsUn", "labelsTs"):
        (place.raw / folder).mkdir()
    for case in ("u0", "u1"):
        shutil.copy(place.label(), place.raw / "labelsUn" / f"{case}.nii.gz")
        shutil.copy(place.label(), place.base / "gt_segmentations" / f"{case}.nii.gz")
        shutil.copy(place.cases / "l0_seg.b2nd", place.base / f"{PLANS}_3d_fullres_unlabeled" / f"{case}_seg.b2nd")
    shutil.copy(place.label(), place.raw / "labelsTs" / "t0.nii.gz")
    return place


@pytest.fixture(scope="module")
def runs(place: Place) -> dict[str, Any]:
    # one step for each phase of the methods that have three
    command = f"801 TRAINER 1 -p {PLANS} {BUDGET.replace('--epochs 1', '--epochs 3')} --preview-every 0".split()
    environment = os.environ | {variable: str(place.root / variable) for variable in VARIABLES}
    hidden = [place.raw / name for name in ("imagesTr", "labelsTr", "imagesUn", "imagesTs", "labelsUn", "labelsTs")]
    own = [place.base / f"{PLANS}_3d_fullres_unlabeled", place.base / "gt_segmentations"]
    found: dict[str, Any] = {}
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(TRAINERS), json.dumps(command)]
    with OpenedFiles(*hidden) as raw, OpenedFiles(*own) as preprocessed:
        process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("RESULT "):
                found |= json.loads(line[len("RESULT ") :])
        process.wait(timeout=60)
        found["raw"], found["preprocessed"] = raw.collect(), preprocessed.collect()
    return found


@pytest.mark.parametrize("name", TRAINERS)
def test_no_training_opens_what_is_hidden(place, runs, name):
    assert runs[name]["code"] == 0
    opened = [Path(path) for path in runs[name]["opened"]]
    assert any(path.parent == place.cases for path in opened), "the trace itself must work"
    # a training reads preprocessed cases only
    assert not [path for path in opened if place.raw in path.parents]
    assert not [path for path in opened if path.name.startswith(("u0_seg", "u1_seg", "t0"))]
    assert not [path for path in opened if path.parent.name == "gt_segmentations" and not path.name.startswith("l")]


def test_nor_do_the_libraries(runs):
    assert runs["raw"] == set()
    # a single step need not draw both unlabeled cases
    assert runs["preprocessed"] & {"u0.b2nd", "u1.b2nd"}, "the watch itself must work"
    assert "l1.nii.gz" in runs["preprocessed"]
    assert not [name for name in runs["preprocessed"] if name.endswith("_seg.b2nd")]
    assert runs["preprocessed"].isdisjoint({"u0.nii.gz", "u1.nii.gz"})


@pytest.mark.parametrize("name", ["SelfTraining", "SwitchedSelfTraining"])
def test_the_trace_saw_rounds(place, runs, name):
    """Else nothing above would be said of the work on whole cases between two phases."""
    (run,) = (place.root / "nnUNet_results").glob(f"*/{name}__*/fold_1")
    made = {path.name.split(".")[0] for path in run.glob("round_*/pseudo_labels/u*.b2nd")}
    assert made >= {"u0", "u1"}
    assert any("pseudo_labels" in path for path in runs[name]["opened"])
