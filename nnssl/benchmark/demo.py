"""The demo: the whole way from raw data to a table and a picture, by the commands that a user would type."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isnan, nan
from pathlib import Path
from statistics import fmean

from nnssl.benchmark.demo_plan import (
    DemoSettings,
    evaluate_words,
    plan_words,
    predict_words,
    prediction_folder,
    split_words,
    train_words,
    training_folder,
)
from nnssl.benchmark.steps import Steps, run_command
from nnssl.dataset.phantom import make_phantom_dataset
from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.pictures.overlay import OverlayCase, save_overlay
from nnssl.utils.files import read_json, write_json

_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_OVERLAY_CASES = 3


@dataclass(frozen=True)
class DemoRow:
    """Result of one trainer: means over classes and test cases, HD95 in mm, and minutes of training."""

    trainer: str
    dice: float
    hd95: float
    failures: int
    minutes: float


@dataclass(frozen=True)
class DemoResult:
    """The table, the picture, and what they are worth in one sentence."""

    rows: list[DemoRow]
    overlay: Path
    reading: str

    def __str__(self) -> str:
        head = f"{'trainer':<24}{'Dice':>8}{'HD95 (mm)':>12}{'failures':>10}{'train (min)':>13}"
        body = [f"{r.trainer:<24}{r.dice:>8.3f}{r.hd95:>12.2f}{r.failures:>10}{r.minutes:>13.1f}" for r in self.rows]
        return "\n".join([head, *body, "", self.reading, f"Picture: {self.overlay}"])


def run_demo(settings: DemoSettings) -> DemoResult:
    """Data, plan and preprocessing, then training, prediction and evaluation with each trainer; table and picture.

    Each step is a command in a process of its own, whose nnU-Net folders lie in the output folder. Finished steps of
    an earlier run are left out, an interrupted training goes on where it was.

    Raises:
        UserError: if a command fails, or the output folder holds other files or a run with other settings.
    """
    if settings.data is not None and not settings.data.is_dir():
        raise UserError("no such folder", where=settings.data, expected="a folder with images/ and labels/")
    steps = Steps(settings.folder, settings.to_json())
    environment = {name: str(settings.folder / name) for name in _FOLDERS}
    for folder in environment.values():
        Path(folder).mkdir(exist_ok=True)

    steps.run("Data", lambda: _make_data(settings, environment))
    configuration = find_configuration(RawDataset.open(settings.raw))
    steps.run("Plan and preprocess", lambda: run_command(plan_words(settings, configuration), environment))
    for trainer in settings.trainers:
        _run_trainer(settings, trainer, configuration, steps, environment)

    result = DemoResult(
        rows=[_row(settings, trainer, steps.seconds[_training_step(trainer)]) for trainer in settings.trainers],
        overlay=_overlay(settings),
        reading=_reading(settings),
    )
    write_json(
        {"rows": [asdict(row) for row in result.rows], "reading": result.reading}, settings.folder / "table.json"
    )
    return result


def find_configuration(dataset: RawDataset) -> str:
    """``2d`` if the images are single slices, else ``3d_fullres``."""
    cases = [*(case.images for case in dataset.labeled.values()), *dataset.unlabeled.values()]
    if not cases:
        raise UserError("the data set has no training cases", where=dataset.folder)
    images, _ = dataset.reader_writer_class()().read_images(cases[0])
    return "2d" if images.shape[1] == 1 else "3d_fullres"


def _make_data(settings: DemoSettings, environment: Mapping[str, str]) -> None:
    if settings.data is not None:
        run_command(split_words(settings, settings.data), environment)
        return
    # left there only if an earlier run ended between writing the data and recording it
    shutil.rmtree(settings.raw, ignore_errors=True)
    make_phantom_dataset(settings.raw, labeled=settings.labeled, seed=settings.seed)
    dataset = RawDataset.open(settings.raw)
    print(
        f"Made a phantom data set, {settings.raw}: {len(dataset.labeled)} labeled, {len(dataset.unlabeled)} unlabeled, "
        f"{len(dataset.test)} test cases"
    )


def _run_trainer(
    settings: DemoSettings, trainer: str, configuration: str, steps: Steps, environment: Mapping[str, str]
) -> None:
    steps.run(_training_step(trainer), lambda: _train(settings, trainer, configuration, environment))
    prediction = predict_words(settings, trainer, configuration)
    steps.run(f"Predict with {trainer}", lambda: run_command(prediction, environment))
    evaluation = evaluate_words(settings, trainer)
    steps.run(f"Evaluate {trainer}", lambda: run_command(evaluation, environment))


def _training_step(trainer: str) -> str:
    return f"Train {trainer}"


def _train(settings: DemoSettings, trainer: str, configuration: str, environment: Mapping[str, str]) -> None:
    folder = training_folder(settings, trainer, configuration)
    words = train_words(settings, trainer, configuration)
    if (folder / "checkpoint_latest.pth").is_file():
        words.append("--c")
    run_command(words, environment)
    if not (folder / "checkpoint_final.pth").is_file():
        raise UserError(
            "the training was stopped before its end",
            where=folder,
            fix="run again to go on from its last checkpoint",
        )


def _row(settings: DemoSettings, trainer: str, seconds: float) -> DemoRow:
    means = read_json(prediction_folder(settings, trainer) / "summary.json")["foreground_mean"]
    return DemoRow(trainer, means["Dice"], means["HD95"], means["failures"], seconds / 60)


def _overlay(settings: DemoSettings) -> Path:
    dataset = RawDataset.open(settings.raw)
    ending = dataset.file_ending
    dice = {trainer: _case_dice(settings, trainer) for trainer in settings.trainers}
    folders = {trainer: prediction_folder(settings, trainer) for trainer in settings.trainers}
    cases = [
        OverlayCase(
            name=case,
            image=Path(dataset.test[case][0]),
            reference=settings.test_labels / f"{case}{ending}",
            predictions={trainer: folder / f"{case}{ending}" for trainer, folder in folders.items()},
            captions={trainer: f"Dice {dice[trainer][case]:.3f}" for trainer in settings.trainers},
        )
        for case in list(dataset.test)[:_OVERLAY_CASES]
    ]
    names = {
        value: name for name, value in dataset.dataset_json["labels"].items() if isinstance(value, int) and value > 0
    }
    return save_overlay(settings.folder / "overlay.png", cases, names)


def _case_dice(settings: DemoSettings, trainer: str) -> dict[str, float]:
    """Mean Dice over the classes of each test case; a class that is excluded from the evaluation does not count."""
    summary = read_json(prediction_folder(settings, trainer) / "summary.json")
    found = {}
    for case in summary["metric_per_case"]:
        values = [metrics["Dice"] for metrics in case["metrics"].values() if not isnan(metrics["Dice"])]
        found[case["case"]] = fmean(values) if values else nan
    return found


def _reading(settings: DemoSettings) -> str:
    iterations = settings.epochs * settings.iterations_per_epoch
    return (
        f"With {settings.labeled} labeled cases and {iterations} iterations this shows that the whole way works; it is "
        "no benchmark, and the figures do not tell which method is better."
    )
