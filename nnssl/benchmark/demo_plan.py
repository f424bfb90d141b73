"""What the demo does: its settings, and the command lines that follow from them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnssl.errors import UserError
from nnssl.utils.files import read_json

DATASET_ID = 1
# nnU-Net knows the channels of these files itself, and nnssl_split names them
_PHOTO_ENDINGS = (".png", ".bmp", ".tif", ".tiff")
_MOST_TEST_CASES = 20
# nnU-Net's 50 validation batches would take longer than such short epochs
SHORT_BUDGET = ("initial_lr=4e-3", "num_val_iterations_per_epoch=2")


@dataclass(frozen=True)
class DemoSettings:
    """What the demo does.

    Attributes:
        output: folder for everything; a second run in it with the same settings does only what is left.
        data: source of a label budget (a folder with images/ and labels/, or a raw data set); None: the phantom.
        channel_names: names of the channels of ``data``; None: "image", which nnU-Net normalizes per image.
        labeled: number of labeled cases; all other training cases are unlabeled.
        trainers: methods to train, each under the same budget.
        epochs, iterations_per_epoch: the budget of each training.
        overrides: hyper-parameters of each training, as ``NAME=VALUE``, on top of those for short trainings
            (`SHORT_BUDGET`).
        device: cpu, cuda or mps; without CUDA the preset for CPUs is used.
        seed: of the phantom or of the draw of labeled cases, and of each training.
        processes: for preprocessing.
    """

    output: Path
    data: Path | None = None
    channel_names: tuple[str, ...] | None = None
    labeled: int = 3
    trainers: tuple[str, ...] = ("Supervised", "MeanTeacher")
    epochs: int = 10
    iterations_per_epoch: int = 25
    overrides: tuple[str, ...] = ()
    device: str = "cpu"
    seed: int = 0
    processes: int = 2

    def __post_init__(self) -> None:
        numbers = ("labeled", "epochs", "iterations_per_epoch", "processes")
        too_small = [name for name in numbers if getattr(self, name) < 1]
        if too_small or not self.trainers or len(set(self.trainers)) < len(self.trainers):
            raise UserError(
                "settings of the demo",
                expected="numbers from 1, and one or more different trainers",
                found=", ".join([f"{name} {getattr(self, name)}" for name in too_small] or self.trainers)
                or "no trainer",
            )

    @property
    def folder(self) -> Path:
        """The output folder, absolute: commands run with paths that do not depend on where they start."""
        return Path(os.path.abspath(self.output))

    @property
    def dataset(self) -> str:
        """Name of the raw data set."""
        name = "Phantom" if self.data is None else Path(os.path.abspath(self.data)).name
        return f"Dataset{DATASET_ID:03d}_" + (re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") or "Data")

    @property
    def raw(self) -> Path:
        """Folder of the raw data set."""
        return self.folder / "nnUNet_raw" / self.dataset

    @property
    def test_labels(self) -> Path:
        """Folder of the reference labels of the test cases, which a label budget keeps outside the data set."""
        return self.raw / "labelsTs" if self.data is None else self.folder / "hidden_labels" / "test"

    @property
    def plans(self) -> str:
        return "nnSSLPlans" if self.device == "cuda" else "nnSSLCPUPlans"

    @property
    def planner(self) -> str:
        return "nnSSLPlanner" if self.device == "cuda" else "nnSSLPlannerCPU"

    def to_json(self) -> dict[str, Any]:
        """What a later run must agree in to go on with this one."""
        values = {name: value for name, value in asdict(self).items() if name not in ("output", "processes")}
        values["data"] = None if self.data is None else os.path.abspath(self.data)
        return json.loads(json.dumps(values))


def split_words(settings: DemoSettings, data: Path) -> list[str]:
    """Arguments of ``nnssl_split`` that make the label budget from ``data``."""
    is_raw = (data / "dataset.json").is_file()
    words = ["split", os.path.abspath(data), "-d", str(DATASET_ID), "-n", settings.dataset.partition("_")[2]]
    words += ["--labeled", str(settings.labeled), "--seed", str(settings.seed)]
    words += ["--hidden-labels", str(settings.folder / "hidden_labels"), "--overwrite"]
    if settings.channel_names:
        words += ["--channel-names", *settings.channel_names]
    elif not is_raw and not any(path.suffix in _PHOTO_ENDINGS for path in (data / "images").glob("*")):
        words += ["--channel-names", "image"]
    if not _has_test_part(data, is_raw):
        labels = sum(1 for _ in (data / ("labelsTr" if is_raw else "labels")).glob("*"))
        words += ["--test", str(max(1, min(_MOST_TEST_CASES, labels // 5)))]
    return words


def plan_words(settings: DemoSettings, configuration: str) -> list[str]:
    """Arguments of ``nnssl_plan_and_preprocess``."""
    words = ["plan_and_preprocess", "-d", str(DATASET_ID), "-pl", settings.planner, "-c", configuration]
    # a trial: what is suspicious in the folder of a user is told and used
    return [*words, "--allow_suspicious", "-np", str(settings.processes)]


def train_words(settings: DemoSettings, trainer: str, configuration: str) -> list[str]:
    """Arguments of ``nnssl_train``: fold all, so that each method gets the whole budget of labels."""
    words = ["train", str(DATASET_ID), trainer, "all", "-c", configuration, "-p", settings.plans]
    words += ["-device", settings.device, "--epochs", str(settings.epochs)]
    words += ["--iterations-per-epoch", str(settings.iterations_per_epoch), "--seed", str(settings.seed)]
    return words + [word for override in [*SHORT_BUDGET, *settings.overrides] for word in ("--set", override)]


def predict_words(settings: DemoSettings, trainer: str, configuration: str) -> list[str]:
    """Arguments of ``nnssl_predict`` for the test cases."""
    words = ["predict", "-i", str(settings.raw / "imagesTs"), "-o", str(prediction_folder(settings, trainer))]
    words += ["-d", str(DATASET_ID), "-tr", trainer, "-c", configuration, "-p", settings.plans, "-f", "all"]
    return [*words, "-device", settings.device]


def evaluate_words(settings: DemoSettings, trainer: str) -> list[str]:
    """Arguments of ``nnssl_evaluate`` for the test cases."""
    folder = prediction_folder(settings, trainer)
    return ["evaluate", "-gt", str(settings.test_labels), "-pred", str(folder), "-o", str(folder / "summary.json")]


def prediction_folder(settings: DemoSettings, trainer: str) -> Path:
    """Masks of the test cases, and their evaluation."""
    return settings.folder / "predictions" / trainer


def training_folder(settings: DemoSettings, trainer: str, configuration: str) -> Path:
    """Where ``nnssl_train`` keeps the checkpoints of fold all."""
    model = f"{trainer}__{settings.plans}__{configuration}"
    return settings.folder / "nnUNet_results" / settings.dataset / model / "fold_all"


def _has_test_part(data: Path, is_raw: bool) -> bool:
    if is_raw:
        return any((data / "labelsTs").glob("*"))
    return (data / "split.json").is_file() and bool(read_json(data / "split.json").get("test"))
