from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from nnssl.cli import run
from nnssl.errors import UserError
from nnssl.evaluation.comparison import FOREGROUND, compare_runs
from nnssl.evaluation.evaluator import evaluate_folders
from nnssl.evaluation.runs import find_summary, open_run, open_runs
from nnssl.evaluation.wording import NOTHING_TO_COMPARE, conclusion
from tests.evaluation.files import make_folders
from tests.evaluation.summaries import write_summary

CASES = [f"case_{number:02}" for number in range(12)]
RNG = np.random.default_rng(0)
BASE = dict(zip(CASES, RNG.uniform(0.6, 0.9, (12, 2)).tolist(), strict=True))
BETTER = {
    case: [value + 0.05 + 0.01 * number for value in values] for number, (case, values) in enumerate(BASE.items())
}


@pytest.fixture
def folder(tmp_path):
    write_summary(tmp_path / "base", BASE)
    write_summary(tmp_path / "better", BETTER)
    return tmp_path


def compare(folder, *texts, metrics=("Dice",), **options):
    return compare_runs(open_runs([f"{text.split('/')[0]}={folder / text}" for text in texts]), metrics, **options)


def test_figures_of_a_pair(folder):
    row = compare(folder, "base", "better").rows[0]
    difference = np.array([np.mean(BETTER[case]) - np.mean(BASE[case]) for case in CASES])
    assert (row.first, row.second, row.class_name) == ("better", "base", FOREGROUND)
    assert row.statistics.mean == pytest.approx(difference.mean())
    assert row.statistics.p_value == pytest.approx(stats.wilcoxon(difference).pvalue)
    assert row.win_tie_loss == (12, 0, 0)
    assert row.effect == 1


def test_lower_distances_are_better(folder):
    row = compare(folder, "base", "better", metrics=("HD95",)).rows[0]
    assert row.statistics.mean < 0
    assert row.effect == 1
    assert row.win_tie_loss == (12, 0, 0)
    assert "better is better in 12 of 12 cases" in compare(folder, "base", "better", metrics=("HD95",)).conclusions[0]


def test_correction_for_several_methods(folder):
    write_summary(folder / "same", {case: [v + 1e-3 * (-1) ** i for v in values] for i, (case, values)
                                    in enumerate(BASE.items())})  # fmt: skip
    rows = compare(folder, "base", "better", "same").rows
    assert [row.p_holm for row in rows] == pytest.approx([2 * rows[0].statistics.p_value, rows[1].statistics.p_value])
    assert len(compare(folder, "base", "better", "same", all_pairs=True).rows) == 3
    rows = compare(folder, "base", "better", "same", per_class=True).rows
    assert [(row.class_name, row.comparisons) for row in rows] == [(FOREGROUND, 2)] * 2 + [("a", 4)] * 2 + [
        ("b", 4)
    ] * 2
    text = " ".join(compare(folder, "base", "better", "same").conclusions)
    assert "better is better in 12 of 12" in text
    assert "same and base: no difference shown" in text
    assert "One training each of base, better, same" in text


def test_too_few_cases_are_said(tmp_path):
    for name, values in (("base", BASE), ("better", BETTER)):
        write_summary(tmp_path / name, {case: values[case] for case in CASES[:5]})
    found = compare(tmp_path, "base", "better")
    assert "too few cases (5)" in found.conclusions[0]
    assert found.rows[0].statistics.p_value == 2 / 2**5


def test_equal_runs_show_no_difference(folder):
    write_summary(folder / "copy", BASE)
    found = compare(folder, "base", "copy")
    assert found.rows[0].statistics.p_value == 1
    assert found.rows[0].statistics.interval is None
    assert "no difference shown" in found.conclusions[0]
    assert "does not show that they are equal" in found.conclusions[0]


def test_seeds_of_one_method_are_averaged_per_case(folder):
    write_summary(folder / "seed_1", {case: [v + 0.1 for v in values] for case, values in BETTER.items()})
    runs = open_runs([f"base={folder / 'base'}", f"A={folder / 'better'}", f"A={folder / 'seed_1'}"])
    found = compare_runs(runs)
    alone = compare(folder, "base", "better").rows[0]
    assert found.rows[0].statistics.mean == pytest.approx(alone.statistics.mean + 0.05)
    assert "One training each of base:" in " ".join(found.conclusions)


def test_an_invented_class_costs_the_method_that_invents_it(tmp_path):
    """Class b is in no reference of case_00: one run invents it (-1: failure), in case_01 both do without."""
    base = {case: [0.8, None if number < 2 else 0.7] for number, case in enumerate(CASES)}
    write_summary(tmp_path / "base", base)
    write_summary(tmp_path / "inventor", base | {CASES[0]: [0.8, -1.0]})
    found = compare(tmp_path, "base", "inventor", per_class=True)
    overall, a, b = found.rows
    assert (b.statistics.n, b.statistics.mean) == (11, pytest.approx(-1 / 11))
    assert b.win_tie_loss == (0, 10, 1)
    assert (a.statistics.n, a.statistics.mean) == (12, 0)
    # case means are (0.8 + 0) / 2 and (0.8 + 1) / 2
    assert overall.statistics.mean == pytest.approx(-0.5 / 12)
    assert (overall.first_failures, overall.second_failures) == (1, 0)
    assert (a.first_failures, b.first_failures) == (0, 1)


def test_a_class_in_no_case_has_no_row(tmp_path):
    for name in ("x", "y"):
        write_summary(tmp_path / name, {case: [0.8, None] for case in CASES})
    assert [row.class_name for row in compare(tmp_path, "x", "y", per_class=True).rows] == [FOREGROUND, "a"]


def test_cases_that_are_not_common_are_named(folder):
    write_summary(folder / "other", {case: BASE[case] for case in CASES[2:]} | {"extra": [0.5, 0.5]})
    found = compare(folder, "base", "other")
    assert found.rows[0].statistics.n == 10
    assert any("case_00, case_01" in note and "base" in note for note in found.notes)
    assert any("extra" in note for note in found.notes)


def test_mistakes(folder):
    with pytest.raises(UserError, match="two methods"):
        compare(folder, "base")
    with pytest.raises(UserError, match="named twice"):
        compare(folder, "base", "base")
    write_summary(folder / "elsewhere", {"x": [0.5, 0.5]})
    with pytest.raises(UserError, match="no case in common"):
        compare(folder, "base", "elsewhere")
    write_summary(folder / "classes", {case: values[:1] for case, values in BASE.items()})
    with pytest.raises(UserError, match="different classes"):
        compare(folder, "base", "classes")
    write_summary(folder / "references", BASE, sizes={CASES[3]: 99})
    with pytest.raises(UserError, match=r"different reference labels\n.*case_03"):
        compare(folder, "base", "references")
    write_summary(folder / "plain", BASE, hd95=False)
    with pytest.raises(UserError, match="metric not found"):
        compare(folder, "base", "plain", metrics=("HD95",))
    (folder / "base" / "summary.json").write_text('{"foreground_mean": 1}')
    with pytest.raises(UserError, match="not a summary"):
        open_runs([folder / "base"])
    (folder / "base" / "summary.json").write_text('{"metric_per_case": [{"case": "a"}]}')
    with pytest.raises(UserError, match="damaged"):
        open_runs([folder / "base"])


def test_where_a_summary_is_found(tmp_path):
    with pytest.raises(UserError, match="run not found"):
        find_summary(tmp_path / "nothing")
    with pytest.raises(UserError, match="no evaluation"):
        find_summary(tmp_path)
    deep = write_summary(tmp_path / "job" / "predicted", BASE)
    assert find_summary(tmp_path / "job") == find_summary(deep) == deep
    write_summary(tmp_path / "job" / "other", BASE)
    with pytest.raises(UserError, match="several evaluations"):
        find_summary(tmp_path / "job")
    validation = write_summary(tmp_path / "fold_0" / "validation", BASE)
    assert find_summary(tmp_path / "fold_0") == validation


def test_names(tmp_path):
    for name in ("A__P__3d", "B__P__3d"):
        write_summary(tmp_path / name / "fold_0" / "validation", BASE)
    names = [run.name for run in open_runs([tmp_path / "A__P__3d", tmp_path / "B__P__3d"])]
    assert names == ["A", "B"]
    write_summary(tmp_path / "one" / "predicted", BASE)
    write_summary(tmp_path / "two" / "predicted", BASE)
    assert [run.name for run in open_runs([tmp_path / "one", tmp_path / "two"])] == ["one", "two"]
    write_summary(tmp_path / "a=b", BASE)
    assert open_runs([tmp_path / "a=b"])[0].summary_file == tmp_path / "a=b" / "summary.json"


def test_an_evaluation_of_this_package_and_one_of_nnunet(tmp_path):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder_simple

    reference, prediction = make_folders(tmp_path)
    result = evaluate_folders(reference, prediction, num_processes=1)
    result.write(prediction / "summary.json")
    compute_metrics_on_folder_simple(str(reference), str(prediction), [1, 2], str(tmp_path / "theirs.json"), 1)
    ours, theirs = open_run(prediction / "summary.json", "ours"), open_run(tmp_path / "theirs.json", "theirs")
    assert ours.cases == theirs.cases == ["a", "b", "c"]
    assert (ours.classes, theirs.classes) == (["left", "right"], ["1", "2"])
    np.testing.assert_allclose(ours.table("Dice"), theirs.table("Dice"))
    assert ours.class_values == {"left": (1,), "right": (2,)}
    assert ours.files["a"].reference == reference / "a.nii.gz"
    assert theirs.files["a"].prediction == prediction / "a.nii.gz"
    assert set(ours.metrics) == {"Dice", "IoU", "HD95", "ASSD", "NSD@1mm", "volume_error"}
    assert (ours.table("volume_error") >= 0).all(axis=None)


def test_conclusions_agree_with_the_corrected_values(tmp_path):
    """Class b is in six cases, whose smallest p is corrected by that of class a, which has more: 0.0312 can be."""
    scores = {
        name: {case: [0.5 + plus * (1 + n / 20), 0.5 + plus * (1 + n / 9) if n < 6 else None]
               for n, case in enumerate(CASES)}
        for name, plus in (("base", 0.0), ("better", 0.1))
    }  # fmt: skip
    for name, values in scores.items():
        write_summary(tmp_path / name, values)
    found = compare(tmp_path, "base", "better", per_class=True)
    b = found.rows[-1]
    assert (b.statistics.n, b.comparisons, b.p_holm) == (6, 2, pytest.approx(2 / 2**6))
    assert "better is better in 6 of 6 cases" in conclusion(b)
    # with as many cases in both classes it could not have been shown
    for name, values in scores.items():
        write_summary(tmp_path / name, {case: values[case] for case in CASES[:6]})
    b = compare(tmp_path, "base", "better", per_class=True).rows[-1]
    assert (b.p_holm, b.least_p_holm) == (pytest.approx(4 / 2**6), pytest.approx(4 / 2**6))
    assert "too few cases (6)" in conclusion(b)


def test_equal_differences_are_shown_by_the_mean(tmp_path):
    for name, dice in (("base", 0.5), ("better", 0.75)):
        write_summary(tmp_path / name, {case: [dice] for case in CASES[:10]})
    found = compare(tmp_path, "base", "better")
    assert found.rows[0].statistics.interval is None
    assert found.conclusions[0].endswith("better is better in 10 of 10 cases (mean difference +0.2500, p = 0.0020).")


def test_cases_that_do_not_differ_do_not_count(tmp_path):
    """Six cases could show a difference, five that differ cannot."""
    for name, dice in (("base", 0.5), ("better", 0.6)):
        cases = {case: [dice + n / 50 * (dice > 0.5)] for n, case in enumerate(CASES[:5])}
        write_summary(tmp_path / name, cases | {CASES[5]: [0.7]})
    found = compare(tmp_path, "base", "better")
    assert (found.rows[0].statistics.ties, found.rows[0].p_holm) == (1, 0.0625)
    assert "no difference shown" in found.conclusions[0]
    assert "Only 5 of 6 cases differ, too few" in found.conclusions[0]


def test_numbers_of_cases_that_differ_are_shown_by_row(tmp_path):
    for name, dice in (("base", 0.5), ("better", 0.6)):
        write_summary(tmp_path / name, {case: [dice, dice if n < 7 else None] for n, case in enumerate(CASES)})
    text = compare(tmp_path, "base", "better", per_class=True).text()
    head, names, _, *rows = text.split("\n\n")[0].splitlines()
    assert head == "Dice (higher is better), 7 to 12 cases"
    assert names.split()[:4] == ["method", "minus", "class", "cases"]
    # two words are the name of the first row
    assert [rows[0].split()[4], rows[1].split()[3], rows[2].split()[3]] == ["12", "12", "7"]
    assert "12 cases\n" in compare(tmp_path, "base", "better").text()


def test_nothing_to_compare(tmp_path):
    for name in ("x", "y"):
        write_summary(tmp_path / name, {case: [None, None] for case in CASES[:3]})
    found = compare(tmp_path, "x", "y", per_class=True)
    assert found.rows == []
    assert found.text() == f"- {NOTHING_TO_COMPARE}"


def test_a_folder_called_as_a_given_name_is_no_seed(folder, capsys):
    write_summary(folder / "Full", BASE)
    with pytest.raises(UserError, match=r"would be called as another one\n.*Full/summary.json\n.*Full, which is given"):
        open_runs([f"Full={folder / 'base'}", folder / "Full", folder / "better"])
    assert [run.name for run in open_runs([f"Base={folder / 'base'}", folder / "Full"])] == ["Base", "Full"]
    assert [run.name for run in open_runs([f"A={folder / 'base'}", f"A={folder / 'Full'}"])] == ["A", "A"]


def test_summaries_in_one_folder_are_no_seeds(tmp_path):
    files = [write_summary(tmp_path / name, BASE).rename(tmp_path / f"{name}.json") for name in ("one", "two")]
    assert [run.name for run in open_runs(files)] == [str(file) for file in files]


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_command(folder, capsys, ending):
    output = folder / f"comparison.{ending}"
    words = [str(folder / "base"), str(folder / "better"), "--metric", "Dice", "HD95", "--per-class", "-o", str(output)]
    assert run("compare", words) == 0
    printed = capsys.readouterr().out
    assert "12/0/0" in printed
    assert "HD95 in mm (lower is better), 12 cases" in printed
    rows = json.loads(output.read_text())["rows"] if ending == "json" else pd.read_csv(output).to_dict("records")
    assert len(rows) == 6
    assert rows[0]["interval_low"] < rows[0]["difference"] < rows[0]["interval_high"]
    assert run("compare", [*words[:-1], "table.txt"]) == 2
    assert "must end with .json or .csv" in capsys.readouterr().err
