"""The stages of a cascade: what the first leaves for the second, and whether the second finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnssl.dataloading.cases import NamedErrors, has_first_stage_mask, how_to_make_first_stage_masks
from nnssl.errors import UserError

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

_NAMED = 5


@dataclass(frozen=True)
class NextStage:
    """A configuration that starts from what another one predicts.

    Attributes:
        preprocessed: its folder of preprocessed cases.
        dataset_class: nnU-Net's, of the format of these cases.
        output: folder for the predictions, on the grid of these cases.
    """

    preprocessed: Path
    dataset_class: Any
    output: Path

    def shape(self, case: str) -> tuple[int, ...]:
        """Spatial shape of a preprocessed case."""
        return NamedErrors(self.dataset_class(str(self.preprocessed), [case])).load_case(case)[0].shape[1:]


def next_stages(trainer: SemiSupervisedTrainer, cases: Sequence[str]) -> list[NextStage]:
    """The stages after the trained one; without those that lack preprocessed ``cases``, of which a warning tells."""
    plans = trainer.plans_manager
    stages = []
    for name in trainer.configuration_manager.next_stage_names or []:
        identifier = plans.get_configuration(name).data_identifier
        preprocessed = Path(trainer.preprocessed_dataset_folder_base, identifier)
        missing = [case for case in cases if not (preprocessed / f"{case}.pkl").is_file()]
        if missing:
            # a cascade takes its cases from the configuration that it inherits from
            planned = plans.plans["configurations"].items()
            source = next((key for key, value in planned if value.get("data_identifier") == identifier), name)
            trainer.print_to_log_file(
                f"WARNING: nothing is predicted for the next stage, {name}: {len(missing)} of {len(cases)} cases are "
                f"not preprocessed in {preprocessed}. To train that stage, run nnssl_plan_and_preprocess -d "
                f"{plans.dataset_name} -c {source} with the planner of before, then nnssl_train {plans.dataset_name} "
                f"{type(trainer).__name__} {trainer.fold} -c {trainer.configuration_name} -p {plans.plans_name} --val"
            )
            continue
        output = Path(trainer.output_folder_base, "predicted_next_stage", name)
        output.mkdir(parents=True, exist_ok=True)
        stages.append(NextStage(preprocessed, infer_dataset_class(str(preprocessed)), output))
    return stages


def check_first_stage(trainer: SemiSupervisedTrainer) -> None:
    """Raises ``UserError`` if a second stage lacks what the first predicts for the labeled cases of the fold."""
    folder = trainer.folder_with_segs_from_previous_stage
    if folder is None:
        return
    split = trainer.split()
    cases = sorted({*split.train, *split.val})
    missing = [case for case in cases if not has_first_stage_mask(folder, case)]
    if missing:
        raise UserError(
            f"the first stage of the cascade has predicted {len(cases) - len(missing)} of {len(cases)} labeled cases",
            where=folder,
            found=f"none of {', '.join(missing[:_NAMED])}{', ...' if len(missing) > _NAMED else ''}",
            fix=how_to_make_first_stage_masks(folder),
        )
