"""Validation during training on patches, and of whole cases after it."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference.export_prediction import export_prediction_from_logits, resample_and_save
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from torch import nn
from tqdm import tqdm

from nnssl.dataloading.cases import NamedErrors
from nnssl.evaluation.cases import CaseResult
from nnssl.evaluation.evaluator import match_folders
from nnssl.inference.predictor import Predictor
from nnssl.inference.workers import CaseQueue, WorkerKilled, most_open, worker_pool
from nnssl.networks.unwrap import deep_supervision, evaluating
from nnssl.trainers.engine.cascade import NextStage, next_stages

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer


class FloatHeads(nn.Module):
    """The deployed network as nnU-Net's online evaluation calls it: float32 heads, this run's precision."""

    def __init__(self, trainer: SemiSupervisedTrainer):
        super().__init__()
        self.trainer = trainer
        self.network = trainer.deployed_network()

    def forward(self, images: torch.Tensor) -> Any:
        enabled = self.trainer.enable_deep_supervision
        # nnU-Net switches the student only, and members of an ensemble may stand in another mode
        with evaluating(self.network), deep_supervision(self.network, enabled):
            heads = self.trainer.heads(self.network, images)
        return heads if enabled else heads[0]


def validate(trainer: SemiSupervisedTrainer, save_probabilities: bool = False) -> None:
    """Predicts the validation cases of the fold with the deployed network and evaluates them.

    Several ranks predict and evaluate a part each; they need not be connected any more. Writes ``validation/<case>``
    and ``validation/summary.json``. Fold ``all`` has no validation cases: its labeled cases were
    trained on, and a Dice on them would only please.
    """
    cases = [] if trainer.fold == "all" else trainer.split().val
    if not cases:
        trainer.print_to_log_file(f"fold {trainer.fold} has no validation cases: the final checkpoint is used as it is")
        return
    folder = Path(trainer.output_folder, "validation")
    folder.mkdir(parents=True, exist_ok=True)
    predicted = _predict_cases(trainer, cases, folder, save_probabilities)
    references = Path(trainer.preprocessed_dataset_folder_base, "gt_segmentations")
    match = partial(match_folders, references, folder, dataset_json=trainer.dataset_json)
    ranks = trainer.ranks
    processes = _export_processes(len(predicted), ranks.local_size)
    own = match(cases=predicted).scores(processes, hidden=not ranks.is_main) if predicted else {}
    parts = ranks.collect({case: score.plain() for case, score in own.items()})
    if parts is None:
        return
    scores = {case: CaseResult.of_plain(values) for part in parts for case, values in part.items()}
    result = match(cases=cases).evaluation(scores)
    result.write(folder / "summary.json")
    for name, dice in result.per_class["Dice"].items():
        trainer.logger.log_summary(f"final_val/class_{name}_dice", dice)
    trainer.logger.log_summary("final_val/foreground_dice", result.foreground_mean["Dice"])
    trainer.print_to_log_file(f"Validation complete\n{result.table()}", add_timestamp=False)
    trainer.print_to_log_file("Mean Validation Dice: ", result.foreground_mean["Dice"])


def predictor_of(trainer: SemiSupervisedTrainer, mirroring: bool = True) -> Predictor:
    """Sliding-window predictor with the deployed network of a trainer, in the precision of its run.

    Args:
        trainer: whose network predicts.
        mirroring: average over inputs that are mirrored along the axes of the training.
    """
    precision = trainer.precision.name
    predictor = Predictor(device=trainer.device, allow_tqdm=False, precision=precision, use_mirroring=mirroring)
    predictor.manual_initialization(
        trainer.deployed_network(),
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        trainer.inference_allowed_mirroring_axes,
    )
    return predictor


def predict_logits(predictor: Predictor, image: torch.Tensor) -> torch.Tensor:
    """Float32 logits ``(K, *S)`` on the CPU of a preprocessed image ``(C, *S)``."""
    with deep_supervision(predictor.network, False):
        # on the device, beside the logits of half its size, there may be no room for what float makes
        return predictor.predict_sliding_window_return_logits(image).cpu().float()


def _predict_cases(
    trainer: SemiSupervisedTrainer, cases: list[str], folder: Path, save_probabilities: bool
) -> list[str]:
    """Writes the masks of the cases that fall to this rank, and returns the names of these cases."""
    predictor = predictor_of(trainer)
    dataset = validation_cases(trainer, cases)
    stages = next_stages(trainer, cases)
    ranks = trainer.ranks
    processes = _export_processes(len(cases) // ranks.size, ranks.local_size)
    if processes == 1:
        processes = 0  # one beside this one gains less than it takes to start
    predicted: list[str] = []
    with worker_pool(processes) as pool:
        exports = CaseQueue(pool, "the export", "set the environment variable nnUNet_def_n_proc=1, then use --val")
        hidden = None if ranks.is_main else True
        for case in tqdm(ranks.deal(cases), "validation", math.ceil(len(cases) / ranks.size), disable=hidden):
            predicted.append(case)
            image, properties = case_image(trainer, dataset, case)
            logits = predict_logits(predictor, image).numpy()
            for function, arguments in _exports(trainer, case, logits, properties, folder, save_probabilities, stages):
                exports.submit(case, function, *arguments)
            _finish(exports, most_open(processes))
        _finish(exports, 0)
    return predicted


def _finish(exports: CaseQueue, most: int) -> None:
    """Waits until at most so many exports are open."""
    while len(exports) > most:
        case = exports.first
        try:
            exports.take()
        except WorkerKilled:
            raise
        except Exception as error:
            raise RuntimeError(f"the prediction of case {case} cannot be written: {error}") from error


def validation_cases(trainer: SemiSupervisedTrainer, cases: list[str]) -> NamedErrors:
    """Labeled cases, with the segmentations of the stage before where there is one."""
    previous = trainer.folder_with_segs_from_previous_stage
    return NamedErrors(
        trainer.dataset_class(trainer.preprocessed_dataset_folder, cases, folder_with_segs_from_previous_stage=previous)
    )


def case_image(trainer: SemiSupervisedTrainer, dataset: NamedErrors, case: str) -> tuple[torch.Tensor, dict]:
    """What the network predicts a case from ``(C, *S)``, and the properties of the case."""
    data, _, previous, properties = dataset.load_case(case)
    image = data[:]
    if trainer.is_cascaded:
        labels = trainer.label_manager.foreground_labels
        image = np.vstack((image, convert_labelmap_to_one_hot(previous[:], labels, output_dtype=image.dtype)))
    return torch.from_numpy(image), properties


def _exports(
    trainer: SemiSupervisedTrainer,
    case: str,
    logits: np.ndarray,
    properties: dict,
    folder: Path,
    probabilities: bool,
    stages: list[NextStage],
) -> list[tuple[Any, tuple]]:
    """Calls of nnU-Net's export: the mask of the case, and what later stages of a cascade start from."""
    plans, configuration, dataset_json = trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json
    target = str(folder / case)
    arguments = (logits, properties, configuration, plans, dataset_json, target, probabilities)
    calls: list[tuple[Any, tuple]] = [(export_prediction_from_logits, arguments)]
    for stage in stages:
        target = str(stage.output / case)
        stage_arguments = (logits, stage.shape(case), target, plans, configuration, properties, dataset_json)
        calls.append((resample_and_save, (*stage_arguments, default_num_processes, stage.dataset_class)))
    return calls


def _export_processes(cases: int, ranks: int) -> int:
    """Processes for export and evaluation of each of the ``ranks`` of this machine.

    Each costs seconds to start, so few cases get few.
    """
    return max(1, min(default_num_processes, (os.cpu_count() or 1) // 2 // ranks, cases // 4))
