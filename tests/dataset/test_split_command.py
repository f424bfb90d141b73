from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnssl.cli import run
from nnssl.dataset.integrity import check_dataset
from nnssl.dataset.raw import RawDataset

from .synthetic import make_source

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    for part in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{part}", str(tmp_path / part))
    return tmp_path


@pytest.fixture
def real_data() -> Path:
    folder = Path(os.environ.get("NNSSL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found in {folder} (set NNSSL_TEST_DATA)")
    return folder


def split(*arguments: object) -> int:
    return run("split", [*map(str, arguments), "-np", "1"])


def test_makes_a_data_set_and_tells(folders, capsys):
    source = make_source(folders / "source", ["p1_a", "p1_b", "p2_a", "p2_b", "p3_a"], ["t1_a"])
    options = ("--labeled", 1, "--validation", 1, "--channel-names", "MRI", "--group-regex", r"([pt]\d)_")
    assert split(source, "-d", 12, "-n", "Few", *options, "--seed", 1, "--hidden-labels", folders / "hidden") == 0
    raw = RawDataset.open(12)
    provenance = raw.dataset_json["provenance"]
    told = capsys.readouterr().out
    assert f"{raw.folder}: {len(provenance['labeled'])} labeled, {len(provenance['validation'])} validation, " in told
    assert f"Labeled: {' '.join(provenance['labeled'])}\n" in told
    assert str(folders / "hidden") in told
    assert json.loads((raw.folder / "groups.json").read_text())["p3_a"] == "p3"
    assert len({case[:2] for case in provenance["labeled"]}) == 1


def test_groups_of_cases_that_the_split_leaves_out(folders, capsys):
    source = make_source(folders / "source", ["c1", "c2", "c3", "c4"], ["t1"])
    (source / "split.json").write_text(json.dumps({"train": ["c1", "c2", "c3"], "test": ["t1"]}))
    groups = {"c1": "p", "c2": "p", "c3": "q", "c4": "q", "t1": "t"}
    (source / "groups.json").write_text(json.dumps(groups))
    assert split(source, "-d", 12, "-n", "Few", "--labeled", 1, "--channel-names", "MRI") == 0
    assert "1 case(s) are neither train nor test" in capsys.readouterr().out
    handed_on = json.loads((RawDataset.open(12).folder / "groups.json").read_text())
    assert handed_on == {case: group for case, group in groups.items() if case != "c4"}
    (source / "groups.json").write_text(json.dumps(groups | {"c5": "q"}))
    assert split(source, "-d", 13, "-n", "Few", "--labeled", 1, "--channel-names", "MRI") == 2
    assert "c5" in capsys.readouterr().err


def test_mistakes_end_with_a_sentence(folders, capsys):
    assert split(folders / "nothing", "-d", 1, "-n", "X", "--labeled", 2) == 2
    assert "not a source of labeled cases" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["source", "-d", "1", "-n", "X"],
        ["source", "-d", "1", "-n", "X", "--labeled", "2", "--labeled-cases", "a"],
        ["source", "-d", "1", "-n", "X", "--labeled", "-2"],
        ["source", "-d", "1", "-n", "X", "--labeled", "2", "--test", "1", "--test-cases", "a"],
        ["source", "-n", "X", "--labeled", "2"],
    ],
)
def test_flags_that_do_not_go_together(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        run("split", arguments)
    assert error.value.code == 2
    assert "usage: nnssl_split" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom nnssl.cli import run\n"
        "try:\n    run('split', ['--help'])\nexcept SystemExit:\n"
        "    print(sorted({'torch', 'numpy', 'nnunetv2'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--labeled-cases" in output
    assert output.endswith("[]\n")


@pytest.mark.data
def test_hippocampus(folders, real_data):
    options = ("--channel-names", "MRI", "--hidden-labels", folders / "hidden")
    assert split(real_data / "hippocampus", "-d", 1, "-n", "Hippocampus4", "--labeled", 4, *options) == 0
    raw = RawDataset.open(1)
    assert (len(raw.labeled), len(raw.unlabeled), len(raw.test)) == (4, 156, 40)
    assert raw.label_values == [0, 1, 2]
    assert len(list((folders / "hidden" / "test").iterdir())) == 40
    assert check_dataset(raw, num_processes=2) == []
    assert (
        split(real_data / "hippocampus", "-d", 2, "-n", "Hippocampus2", "--labeled", 2, "--channel-names", "MRI") == 0
    )
    assert set(RawDataset.open(2).labeled) < set(raw.labeled)


@pytest.mark.data
def test_patients_of_acdc(folders, real_data):
    draw = json.loads((real_data / "acdc_crop" / "split.json").read_text())["labeled_3_patients"]
    options = ("--channel-names", "MRI", "--group-regex", r"(patient\d+)_")
    assert split(real_data / "acdc_crop", "-d", 3, "-n", "Acdc", "--labeled-cases", *draw, *options) == 0
    raw = RawDataset.open(3)
    assert {case.split("_")[0] for case in raw.labeled} == set(draw)
    assert (len(raw.labeled), len(raw.unlabeled), len(raw.test)) == (6, 94, 20)
    assert split(real_data / "acdc_crop", "-d", 4, "-n", "Acdc5", "--labeled", 5, "--validation", 3, *options) == 0
    raw = RawDataset.open(4)
    assert len(raw.dataset_json["provenance"]["labeled"]) == 6
    assert len(raw.dataset_json["provenance"]["validation"]) == 4


@pytest.mark.data
def test_ultrasound_png(folders, real_data):
    options = ("--labeled", 8, "--group-regex", r"(.*?)_\d*HC$")
    assert split(real_data / "hc18", "-d", 5, "-n", "Head", *options) == 0
    raw = RawDataset.open(5)
    assert raw.dataset_json["channel_names"] == {"0": "gray"}
    assert len(raw.labeled) + len(raw.unlabeled) == 243 + 60
    groups = json.loads((raw.folder / "groups.json").read_text())
    assert not {groups[case] for case in raw.labeled} & {groups[case] for case in raw.unlabeled}
