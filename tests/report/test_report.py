from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from nnssl.cli import run
from nnssl.errors import UserError
from nnssl.evaluation.evaluator import evaluate_folders
from nnssl.evaluation.wording import NOTHING_TO_COMPARE
from nnssl.report.build import write_report
from nnssl.report.figures import style
from nnssl.report.pictures import case_views
from nnssl.report.results import ReportOptions
from nnssl.utils.files import write_json
from tests.evaluation.files import label_map, make_folders, write_labels
from tests.evaluation.summaries import write_summary
from tests.report.browser import CHROMIUM, DRIVER, MISSING, browser

SHAPE = (12, 20, 16)
EVIL = '"><img src=x onerror=document.title=666><script>document.title=666<&$x_2$'


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """Two methods on three cases, one with a name that is no good HTML; the first with all files of a training."""
    folder = tmp_path_factory.mktemp("runs")
    make_folders(folder, cases=2, shape=SHAPE)
    reference = folder / "gt"
    write_labels(reference / f"{EVIL}.nii.gz", label_map(7, shape=SHAPE))
    cases = [file.name.removesuffix(".nii.gz") for file in sorted(reference.iterdir())]
    for case in cases:
        image = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
        (folder / "images").mkdir(exist_ok=True)
        write_labels(folder / "images" / f"{case}_0000.nii.gz", image)
    for number, name in enumerate(("First", "Second")):
        predicted = folder / name
        predicted.mkdir()
        for seed, case in enumerate(cases):
            write_labels(predicted / f"{case}.nii.gz", label_map(seed, 0.2 + 0.3 * number, SHAPE))
        model = folder / f"{name}__nnSSLPlans__3d_fullres"
        _write_training(model / "fold_all", name)
        record = {"model_folder": str(model), "folds": ["all"], "inputs": [str(folder / "images")]}
        write_json(record, predicted / "predict_from_raw_data_args.json")
        result = evaluate_folders(reference, predicted, dataset_json=folder / "pred" / "dataset.json", num_processes=1)
        result.write(predicted / "summary.json")
    return [str(folder / "First"), str(folder / "Second")]


def _write_training(fold: Path, name: str) -> None:
    fold.mkdir(parents=True)
    record = {
        "command": ["nnssl", "train", "1", name, "two words"],
        "fold": "all",
        "hyperparameters": {"initial_lr": 0.01},
        "settings": {"seed": 3},
        "versions": {"torch": "9.9"},
    }
    write_json(record, fold / "run.json")
    (fold / "curves.csv").write_text("epoch,lr,loss,consistency_<b>,step_seconds\n0,1,0.5,0.1,1\n1,1,0.4,,1\n")
    write_json({"plans_name": "ThePlans", "semi_supervised": {"num_labeled": 5}}, fold.parent / "plans.json")
    write_json({"numTraining": 5, "provenance": {"made_by": "somebody"}}, fold.parent / "dataset.json")


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return write_report(folder / "r.html", runs, ReportOptions(title="<b>Title", ceiling="Second", cases=3))


class Page(HTMLParser):
    """Tags with their attributes, and all text."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_content(report):
    page = Page(report)
    for text in ("ThePlans", "somebody", "initial_lr", "torch 9.9", "'two words'", "seed 3", "axial", "sagittal"):
        assert text in page.text, text
    assert "too few cases (3)" in page.text
    assert "gap to Second closed" in page.text
    titles = {attrs["aria-label"] for tag, attrs in page.tags if tag == "svg" and "aria-label" in attrs}
    assert {"loss over the epochs", "consistency_<b> over the epochs"} <= titles
    assert not any("step_seconds" in title for title in titles)
    # 3 cases, 3 orientations; contours of the reference and of 2 methods
    views = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("class") == "view"]
    assert len(views) == 9
    masks = {attrs["data-mask"] for tag, attrs in page.tags if tag == "path" and "data-mask" in attrs}
    assert masks == {"0", "1", "2"}


def test_names_are_text_whatever_they_hold(report):
    page = Page(report)
    assert page.text.count(EVIL) == 2
    assert "<b>Title" in page.text
    assert "consistency_<b>" in page.text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not {"img", "b"} & {tag for tag, _ in page.tags}
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]


def test_nothing_points_to_another_file(report):
    for tag, attrs in Page(report).tags:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            target = attrs.get(name) or ""
            assert target.startswith(("#", "data:")) or not target, (tag, attrs)
    assert not re.search(r"url\((?!#)|@import", report.read_text(encoding="utf-8"))


def test_cases_are_listed_from_the_worst_on(runs, report):
    text = report.read_text(encoding="utf-8")
    table = text[text.index('<table class="sortable">') :].split("</table>")[0]
    rows = [re.findall(r'data-value="([\d.]+)"', row) for row in table.split("<tr>")[2:]]
    means = [float(first) + float(second) for first, second, _ in rows]
    assert means == sorted(means)
    assert len(means) == 3


def test_what_is_not_there_is_said(tmp_path):
    """Summaries alone: no scans, no training."""
    scores = {f"case_{n}": [0.5 + n / 100, 0.6] for n in range(8)}
    for name in ("a", "b"):
        write_summary(tmp_path / name, scores)
    page = Page(write_report(tmp_path / "r.html", [tmp_path / "a", tmp_path / "b"], ReportOptions(cases=2)))
    assert "case_0: files not found" in page.text
    assert "not recorded" in page.text
    assert "over the epochs" not in page.text


def test_one_run_of_an_evaluation_without_distances(tmp_path):
    write_summary(tmp_path / "a", {f"case_{n}": [0.5 + n / 100] for n in range(4)}, hd95=False)
    page = Page(write_report(tmp_path / "r.html", [tmp_path / "a"], ReportOptions(cases=0)))
    assert "nothing to compare" in page.text
    assert "HD95" not in page.text


def test_budgets_of_one_method_become_curves(tmp_path):
    words = []
    for budget in (2, 8):
        for name in ("A", "B"):
            fold = tmp_path / f"{name}{budget}" / f"{name}__P__3d" / "fold_all"
            scores = {f"case_{n}": [0.5 + budget / 50 + n / 100] for n in range(8)}
            write_summary(fold / "validation", scores)
            write_json({"fold": "all", "cases": {"labeled": budget}}, fold / "run.json")
            words.append(f"{name}={fold}")
    page = Page(write_report(tmp_path / "r.html", words, ReportOptions(cases=0)))
    assert "A, 2 labeled" in page.text
    assert any(attrs.get("aria-label") == "Dice by number of labeled cases" for _, attrs in page.tags)


def test_no_class_in_any_case(tmp_path):
    for name in "xy":
        write_summary(tmp_path / name, {f"case_{n}": [None, None] for n in range(4)})
    options = ReportOptions(cases=0, ceiling="y")
    page = Page(write_report(tmp_path / "r.html", [tmp_path / name for name in "xy"], options))
    assert NOTHING_TO_COMPARE in page.text


@pytest.mark.parametrize("content", [b"", b"loss\n1\n", b"\xff\xfe", b'epoch,loss\n0,"1\n'])
def test_curves_that_cannot_be_read(tmp_path, content):
    fold = tmp_path / "A__P__3d" / "fold_0"
    write_summary(fold / "validation", {f"case_{n}": [0.5 + n / 100] for n in range(4)})
    (fold / "curves.csv").write_bytes(content)
    page = Page(write_report(tmp_path / "r.html", [fold], ReportOptions(cases=0)))
    assert f"the curves of the training are not shown ({fold / 'curves.csv'}: " in page.text
    assert "over the epochs" not in page.text


def test_mistakes(runs, tmp_path):
    with pytest.raises(UserError, match=r"must end with \.html"):
        write_report(tmp_path / "r.txt", runs)
    with pytest.raises(UserError, match="none of the methods"):
        write_report(tmp_path / "r.html", runs, ReportOptions(ceiling="Third"))
    with pytest.raises(UserError, match="--cases"):
        write_report(tmp_path / "r.html", runs, ReportOptions(cases=-1))


def test_command_and_missing_scans(runs, tmp_path, capsys):
    words = [runs[0], f"Name={runs[1]}", "-o", str(tmp_path / "x.html"), "--cases", "1", "--images", str(tmp_path)]
    assert run("report", words) == 0
    assert "Written:" in capsys.readouterr().out
    page = Page(tmp_path / "x.html")
    assert "Name" in page.text
    assert "its scan was not found" in page.text


def test_views_of_a_volume(tmp_path):
    """A box of 4 x 6 x 8 voxels (z, y, x) of 3 x 2 x 1 mm, at the top of the volume; margins are 12 mm."""
    mask = np.zeros((30, 40, 50), np.uint8)
    mask[24:28, 17:23, 20:28] = 3
    for name, array in (("image", mask.astype(np.float32)), ("mask", mask)):
        write_labels(tmp_path / f"{name}.nii.gz", array, spacing=(1, 2, 3))
    views = case_views(tmp_path / "image.nii.gz", [tmp_path / "mask.nii.gz"], {"box": (3,)})
    assert [view.name for view in views] == ["axial", "coronal", "sagittal"]
    axial, coronal, _ = views
    assert (axial.columns, axial.rows) == (8 + 24, 6 + 12)
    assert (axial.width_mm, axial.height_mm) == (32, 36)
    assert (coronal.columns, coronal.rows) == (32, 4 + 4 + 2)
    (contour,) = axial.contours
    points = np.array([float(number) for number in re.findall(r"[\d.]+", contour.path)]).reshape(-1, 2)
    assert points.min(0) == pytest.approx((12, 6))
    assert points.max(0) == pytest.approx((20, 12))
    # the upper end of the body is the upper end of the picture: 2 rows of margin are left there
    numbers = np.array([float(n) for n in re.findall(r"[\d.]+", coronal.contours[0].path)]).reshape(-1, 2)
    assert numbers[:, 1].min() == pytest.approx(2)


def test_views_of_pictures_and_mistakes(tmp_path):
    mask = np.zeros((30, 40), np.uint8)
    write_labels(tmp_path / "empty.png", mask)
    mask[5:9, 5:9] = 1
    write_labels(tmp_path / "mask.png", mask)
    (view,) = case_views(tmp_path / "mask.png", [tmp_path / "empty.png", tmp_path / "mask.png"], {"a": (1,)})
    assert (view.name, [contour.mask for contour in view.contours]) == ("slice", [1])
    (view,) = case_views(tmp_path / "mask.png", [tmp_path / "empty.png"], {"a": (1,)})
    assert (view.rows, view.columns, view.contours) == (30, 40, [])
    write_labels(tmp_path / "small.png", mask[:-1])
    with pytest.raises(UserError, match="differ in size"):
        case_views(tmp_path / "mask.png", [tmp_path / "small.png"], {"a": (1,)})


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)
def test_in_a_browser(report, tmp_path):
    with browser() as page:
        page.open(report)
        rows = "[...document.querySelectorAll('.sortable tbody tr')].map(r => r.cells[1].dataset.value)"
        before = page.run(rows)
        page.click(".sortable th:nth-child(2) button")
        assert page.run(rows) == sorted(before, key=float)
        page.click(".sortable th:nth-child(2) button")
        assert page.run(rows) == sorted(before, key=float, reverse=True)
        assert page.run("document.querySelector('.sortable th:nth-child(2)').ariaSort") == "descending"
        page.click(".sortable th:nth-child(1) button")
        names = page.run("[...document.querySelectorAll('.sortable tbody th')].map(r => r.textContent)")
        assert names[-2:] == ["a", "b"]

        visible = (
            "[...new Set([...document.querySelectorAll('path[data-mask]')].filter(p => "
            "getComputedStyle(p).display !== 'none').map(p => p.dataset.mask))].sort().join()"
        )
        assert page.run(visible) == "0,1"
        page.click("input[value='2']")
        assert page.run(visible) == "0,2"
        page.press("\ue014")  # right arrow: the next choice, the reference only
        assert page.run(visible) == "0"

        for width, dark in ((1280, False), (1280, True), (390, False), (390, True)):
            page.screen(width, 800, dark=dark, mobile=width < 600)
            assert page.run("document.documentElement.scrollWidth") <= width
            background = page.run("getComputedStyle(document.body).backgroundColor")
            assert (background == "rgb(255, 255, 255)") is not dark
        assert page.run("document.title") == "<b>Title"
        assert page.console() == []
        assert {url.split(":")[0] for url in page.requests()} <= {"file", "data"}


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)
def test_the_browser_sees_errors_and_requests(tmp_path):
    """The test above can fail: what it looks for is found where it is."""
    (tmp_path / "bad.html").write_text("<script>throw Error('loud')</script><img src='http://127.0.0.1:9/x.png'>")
    with browser() as page:
        page.open(tmp_path / "bad.html")
        assert any("loud" in message for message in page.console())
        assert any(url.startswith("http:") for url in page.requests())


def test_no_two_methods_look_alike():
    # curves of many epochs have no markers, points have no dashes
    assert len({(style(number).color, style(number).marker) for number in range(40)}) == 40
    assert len({(style(number).color, style(number).dashes) for number in range(40)}) == 40
