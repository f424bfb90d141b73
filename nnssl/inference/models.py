"""Trained models: which there are, and which one is meant."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnssl.errors import UserError
from nnssl.planners.plans_file import read_plans
from nnssl.utils.files import read_json
from nnssl.utils.paths import dataset_name, results_folder

FINAL_CHECKPOINT = "checkpoint_final.pth"
DEFAULT_PLANS = "nnSSLPlans"
DEFAULT_CONFIGURATIONS = ("3d_fullres", "2d")
AUTO = "auto"
"""Name of no trainer: the one that was chosen when the training began."""


@dataclass(frozen=True)
class TrainedModel:
    """A model folder (``<trainer>__<plans>__<configuration>``) and the folds of it that are meant.

    Attributes:
        folder: holds plans.json, dataset.json and fold_X/<checkpoint>.
        folds: names without the prefix, such as ``("0", "1")`` or ``("all",)``.
        checkpoint: file name of the checkpoint in each fold.
        unfinished: folds that were started and have no such checkpoint.
    """

    folder: Path
    folds: tuple[str, ...]
    checkpoint: str = FINAL_CHECKPOINT
    unfinished: tuple[str, ...] = ()

    @property
    def plans(self) -> dict:
        """plans.json of the folder."""
        return read_plans(self.folder / "plans.json", fix="a model folder needs plans.json; copy it as a whole")

    @property
    def dataset_json(self) -> dict:
        """dataset.json of the folder."""
        path, fix = self.folder / "dataset.json", "a model folder needs dataset.json; copy it as a whole"
        content = read_json(path, fix=fix)
        if not isinstance(content, dict):
            raise UserError("dataset.json is not an object", where=path, found=type(content).__name__, fix=fix)
        # "modality" is the name of old for the channels, which nnU-Net still reads
        missing = [key for key in ("labels", "file_ending") if key not in content]
        if not content.get("channel_names") and not content.get("modality"):
            missing.append("channel_names")
        if missing:
            raise UserError(f"dataset.json lacks {', '.join(missing)}", where=path, fix=fix)
        return content

    def checkpoint_files(self) -> list[Path]:
        """One checkpoint per fold, in the order of ``folds``."""
        return [self.folder / f"fold_{fold}" / self.checkpoint for fold in self.folds]

    def __str__(self) -> str:
        name = f"{self.folder.parent.name}/{self.folder.name}"
        text = f"{name}, fold{'s' * (len(self.folds) > 1)} {' '.join(self.folds)} ({self.checkpoint})"
        return text + (f"; not finished and left out: {' '.join(self.unfinished)}" if self.unfinished else "")


@dataclass(frozen=True)
class _Candidate:
    folder: Path
    trainer: str
    plans: str
    configuration: str


def find_model(
    dataset: str | int,
    *,
    trainer: str | None = None,
    plans: str | None = None,
    configuration: str | None = None,
    folds: Iterable[str | int] | None = None,
    checkpoint: str = FINAL_CHECKPOINT,
) -> TrainedModel:
    """Finds the trained model of a data set in ``$nnUNet_results``.

    The trainer ``auto`` is the one that was chosen when a training was asked for it. What is not given is chosen among
    the models that have at least one fold with the checkpoint: the trainer if there is only one; plans nnSSLPlans, else
    the only ones; configuration 3d_fullres, else 2d, else the only one; all numbered folds with the checkpoint, else
    fold all.

    Raises:
        UserError: if no model, or more than one, is meant; the message lists those found.
    """
    base = results_folder() / dataset_name(dataset)
    wanted = {"trainer": None if trainer == AUTO else trainer, "plans": plans, "configuration": configuration}
    models = list(_candidates(base))
    finished = [model for model in models if _folds_with(model.folder, checkpoint)]
    matching = [m for m in finished if all(v is None or getattr(m, k) == v for k, v in wanted.items())]
    if trainer == AUTO:
        matching = [model for model in matching if model.trainer == _auto_trainer(base, model)]
        wanted["trainer"] = AUTO
    if not matching:
        raise _nothing_matches(base, wanted, models, finished, checkpoint)
    if trainer != AUTO:
        matching = _choose(matching, "trainer", "-tr", ())
    matching = _choose(matching, "plans", "-p", (DEFAULT_PLANS,))
    # by now there is one trainer, also where auto stands for different ones
    matching = _choose(matching, "configuration", "-c", DEFAULT_CONFIGURATIONS)
    return open_model(matching[0].folder, folds=folds, checkpoint=checkpoint)


def open_model(
    folder: str | os.PathLike[str],
    *,
    folds: Iterable[str | int] | None = None,
    checkpoint: str = FINAL_CHECKPOINT,
) -> TrainedModel:
    """The model in ``folder`` with the given folds; without them all numbered folds with the checkpoint, else fold all.

    Raises:
        UserError: if the folder is no model folder or lacks a fold.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("model folder not found", where=folder)
    for name in ("plans.json", "dataset.json"):
        if not (folder / name).is_file():
            raise UserError(
                "not a model folder",
                where=folder,
                expected="plans.json, dataset.json and folders fold_0, fold_1, ... or fold_all",
                found=", ".join(sorted(p.name for p in folder.iterdir())[:10]) or "an empty folder",
            )
    present = _folds_with(folder, checkpoint)
    started = sorted(p.name.removeprefix("fold_") for p in folder.glob("fold_*") if p.is_dir())
    unfinished = tuple(fold for fold in started if fold not in present)
    if folds is None:
        numbered = tuple(fold for fold in present if fold != "all")
        chosen = numbered or present
        if not chosen:
            raise UserError(
                f"no fold of the model has {checkpoint}",
                where=folder,
                found=f"unfinished folds: {' '.join(unfinished)}" if unfinished else "no folder fold_0, fold_1, ...",
                fix="finish the training, or name another checkpoint with -chk, such as checkpoint_best.pth",
            )
        return TrainedModel(folder, chosen, checkpoint, tuple(f for f in unfinished if f != "all" or not numbered))
    chosen = tuple(dict.fromkeys(_fold_name(fold) for fold in folds))
    missing = [fold for fold in chosen if fold not in present]
    if missing or not chosen:
        raise UserError(
            f"the model has no {checkpoint} in fold {' '.join(missing)}" if missing else "no fold is named",
            where=folder,
            expected=f"folds with {checkpoint}: {' '.join(present) or 'none'}",
            fix="choose among them with -f, or name another checkpoint with -chk",
        )
    return TrainedModel(folder, chosen, checkpoint)


def auto_record(results: Path, plans: str, configuration: str) -> Path:
    """File below the results of a data set that says which trainer ``auto`` stands for."""
    return results / f"{AUTO}__{plans}__{configuration}.json"


def _auto_trainer(base: Path, model: _Candidate) -> str | None:
    file = auto_record(base, model.plans, model.configuration)
    return read_json(file, fix="name the trainer with -tr")["trainer"] if file.is_file() else None


def _candidates(base: Path) -> Iterable[_Candidate]:
    for folder in sorted(base.glob("*__*__*")) if base.is_dir() else ():
        parts = folder.name.split("__")
        if folder.is_dir() and len(parts) == 3:
            yield _Candidate(folder, *parts)


def _folds_with(folder: Path, checkpoint: str) -> tuple[str, ...]:
    names = [path.parent.name.removeprefix("fold_") for path in folder.glob(f"fold_*/{checkpoint}")]
    return tuple(sorted((n for n in names if n == "all" or n.isdigit()), key=lambda n: (n == "all", n.zfill(9))))


def _fold_name(fold: str | int) -> str:
    text = str(fold)
    if text != "all" and not re.fullmatch(r"\d+", text):
        raise UserError("not a fold", found=text, expected="a number or all")
    return text if text == "all" else str(int(text))


def _choose(models: Sequence[_Candidate], what: str, flag: str, preferred: Sequence[str]) -> list[_Candidate]:
    values = sorted({getattr(model, what) for model in models})
    choice = next((value for value in preferred if value in values), values[0] if len(values) == 1 else None)
    if choice is None:
        raise UserError(
            "more than one trained model matches",
            where=models[0].folder.parent,
            found="".join(f"\n    {model.folder.name}" for model in models),
            fix=f"choose with {flag}: {', '.join(values)}",
        )
    return [model for model in models if getattr(model, what) == choice]


def _nothing_matches(
    base: Path,
    wanted: dict[str, str | None],
    models: Sequence[_Candidate],
    finished: Sequence[_Candidate],
    checkpoint: str,
) -> UserError:
    given = ", ".join(f"{name} {value}" for name, value in wanted.items() if value is not None)
    unfinished = [model for model in models if model not in finished]
    lines = [f"\n    {model.folder.name}" for model in finished]
    lines += [f"\n    {model.folder.name} (no fold has {checkpoint})" for model in unfinished]
    return UserError(
        f"no trained model with {given}" if given else "no trained model",
        where=base,
        expected=f"<trainer>__<plans>__<configuration>/fold_X/{checkpoint}",
        found="".join(lines) or "no model",
        fix="train it with nnssl_train, or choose one of those found" if models else "train one with nnssl_train",
    )
