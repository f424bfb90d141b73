"""Pseudo-labels of all unlabeled cases, by the whole-volume predictor."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from nnssl.dataloading.cases import NamedErrors, unlabeled_folder
from nnssl.dataloading.properties import read_properties
from nnssl.dataloading.pseudo_labeled import PseudoLabels
from nnssl.dataloading.stability import changed_and_foreground, instability, worst_cases
from nnssl.errors import UserError
from nnssl.inference.predictor import Predictor
from nnssl.inference.uncertainty import estimated_dice, values_by_channel
from nnssl.preprocessing.case import preprocess_mask
from nnssl.trainers.engine.pipelines import unlabeled_images
from nnssl.trainers.engine.validation import predict_logits, predictor_of
from nnssl.utils.files import atomic_path

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

COLUMNS = (
    "case",
    "foreground_voxels",
    "estimated_dice",
    "changed_voxels",
    "instability",
    "mean_instability",
    "used",
    "reason",
)


def predict_unlabeled(
    trainer: SemiSupervisedTrainer,
    target: PseudoLabels,
    previous: PseudoLabels | None,
    stopping: Callable[[], bool],
) -> bool:
    """Predicts with the deployed network all unlabeled cases that ``target`` lacks; ranks share them.

    With each case are kept the number of its ``foreground`` voxels, what its ``estimated_dice`` is (as by
    ``nnssl_predict --save_uncertainty``; None without foreground) and, if ``previous`` holds it, the number of voxels
    that have ``changed`` since. Nothing but the preprocessed images is read.

    Returns:
        whether all is done; False on all ranks when ``stopping`` became true on one, after the cases in work.
    """
    ranks = trainer.ranks
    missing = ranks.from_main(lambda: [case for case in trainer.split().unlabeled if case not in target])
    images = NamedErrors(unlabeled_images(trainer))
    predictor = predictor_of(trainer, trainer.mirrors_between_phases)
    configuration, labels_of = trainer.configuration_manager, trainer.label_manager
    total, hidden = math.ceil(len(missing) / ranks.size), None if ranks.is_main else True
    for case in tqdm(ranks.deal(missing, stopping), "pseudo-labels", total, unit="case", leave=False, disable=hidden):
        image, mask = images.load_case(case)
        labels, quality = pseudo_label(predictor, torch.from_numpy(image[:]))
        if mask is not None:
            # nnU-Net's convention, by which its transforms keep the outside at zero
            labels[(labels == 0) & (mask[:] == 0)] = -1
        facts = {"foreground": int(np.count_nonzero(labels > 0)), "estimated_dice": quality}
        if previous is not None and case in previous:
            facts["changed"], _ = changed_and_foreground(previous.labels(case)[:], labels)
        target.write(case, labels, labels_of, configuration.patch_size, facts)
    return not any(ranks.gather([stopping()]))


def pseudo_label(predictor: Predictor, image: torch.Tensor) -> tuple[NDArray[np.int16], float | None]:
    """Labels ``(1, *S)`` of a preprocessed image ``(C, *S)``, and what their Dice is estimated to be."""
    labels_of = predictor.label_manager
    probabilities = labels_of.apply_inference_nonlin(predict_logits(predictor, image))
    labels = labels_of.convert_probabilities_to_segmentation(probabilities).numpy()[None].astype(np.int16)
    return labels, estimated_dice(probabilities.numpy(), labels[0], values_by_channel(labels_of))


def take_over_masks(
    trainer: SemiSupervisedTrainer, source: Path, target: PseudoLabels, cases: Iterable[str]
) -> list[str]:
    """Brings masks of unlabeled cases, made elsewhere, to the preprocessed images; those ``target`` has are kept.

    Args:
        trainer: in whose configuration the images are preprocessed.
        source: folder with masks named as the cases, such as ``nnssl_atlas_predict`` writes.
        target: receives them.
        cases: unlabeled cases of the fold.

    Returns:
        those that have a mask.

    Raises:
        UserError: if none has one, or a mask does not fit its scan or the classes of the data set.
    """
    ending = trainer.dataset_json["file_ending"]
    files = {case: source / f"{case}{ending}" for case in cases}
    files = {case: file for case, file in files.items() if case in target or file.is_file()}
    if not files:
        raise UserError(
            "no unlabeled case of the fold has a mask there",
            where=source,
            expected=f"files named as the cases in imagesUn, such as CASE{ending}",
            fix="nnssl_atlas_predict writes such a folder",
        )
    images, manager = NamedErrors(unlabeled_images(trainer)), trainer.label_manager
    plans, configuration = trainer.plans_manager, trainer.configuration_manager
    folder = unlabeled_folder(trainer.preprocessed_dataset_folder)
    for case in tqdm([case for case in files if case not in target], "initial pseudo-labels", unit="case", leave=False):
        properties = read_properties(Path(folder, f"{case}.pkl"))
        labels = preprocess_mask(str(files[case]), properties, plans, configuration).astype(np.int16)
        unknown = sorted(set(np.unique(labels).tolist()) - set(manager.all_labels))
        if unknown:
            raise UserError("a mask holds values that are no class", where=files[case], found=unknown)
        _, mask = images.load_case(case)
        if mask is not None:
            labels[(labels == 0) & (mask[:] == 0)] = -1
        facts = {"foreground": int(np.count_nonzero(labels > 0))}
        target.write(case, labels, manager, configuration.patch_size, facts)
    return list(files)


def stability_table(
    rounds: list[PseudoLabels], cases: Iterable[str], drop_share: float, used_share: float = 1.0
) -> list[dict[str, Any]]:
    """A row per case: how stable and how good its pseudo-labels are, and whether those of the last round are used.

    A case is judged by the mean of its instabilities between consecutive rounds; one that was predicted only once
    cannot be judged so and is used.

    Args:
        rounds: pseudo-labels of all rounds up to the last.
        cases: that the last round holds.
        drop_share: share of the judged cases that are left out, those of the highest instability.
        used_share: share of the cases that are used, those of the highest estimated Dice (rounded up); a case without
            foreground, which has none, comes last. What is unstable is left out of these.
    """
    facts = {case: [one.facts(case) for one in rounds if case in one] for case in sorted(cases)}
    estimates = {case: row[-1].get("estimated_dice") for case, row in facts.items()}
    doubts = {case: math.inf if known is None else 1 - known for case, known in estimates.items()}
    doubtful = set(worst_cases(doubts, 1 - used_share))
    history = {
        case: [instability(fact["changed"], fact["foreground"]) for fact in row if "changed" in fact]
        for case, row in facts.items()
    }
    means = {case: sum(values) / len(values) for case, values in history.items() if values}
    judged = {case: mean for case, mean in means.items() if case not in doubtful}
    dropped = set(worst_cases(judged, drop_share))

    def reason(case: str) -> str:
        if case in doubtful:
            return f"one of the {len(doubtful)} of {len(facts)} cases with the lowest estimated Dice"
        if case in dropped:
            return f"one of the {len(dropped)} least stable of {len(judged)} cases"
        return "" if case in means else "predicted once, cannot be judged yet"

    return [
        {
            "case": case,
            "foreground_voxels": row[-1]["foreground"],
            "estimated_dice": "" if estimates[case] is None else estimates[case],
            "changed_voxels": row[-1].get("changed", ""),
            "instability": history[case][-1] if case in means else "",
            "mean_instability": means.get(case, ""),
            "used": "no" if case in dropped | doubtful else "yes",
            "reason": reason(case),
        }
        for case, row in facts.items()
    ]


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the rows of `stability_table` as CSV, atomically."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def used_cases(path: Path) -> list[str]:
    """Cases of a written table whose pseudo-labels are used.

    Raises:
        UserError: if the table is missing.
    """
    if not path.is_file():
        raise UserError(
            "the table of pseudo-labels is missing, so the training cannot go on",
            where=path,
            fix="put the folder back, or start again with --overwrite",
        )
    with open(path, newline="", encoding="utf-8") as stream:
        return [row["case"] for row in csv.DictReader(stream) if row["used"] == "yes"]
