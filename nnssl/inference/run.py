"""Prediction of a folder of scans: checks, preprocessing, network, export, with every failure named by its case."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl.errors import UserError
from nnssl.inference.cases import InputCase, collect_cases, previous_stage_files
from nnssl.inference.models import TrainedModel
from nnssl.inference.pipeline import CasePipeline
from nnssl.inference.quality import collect_quality, estimates_file
from nnssl.utils.files import read_json, write_json

if TYPE_CHECKING:
    from nnssl.inference.predictor import Predictor

RECORD = "predict_from_raw_data_args.json"
_SAME_ON_CONTINUE = ("model_folder", "folds", "checkpoint", "step_size", "mirroring")


@dataclass(frozen=True)
class PredictionOptions:
    """How to predict; the defaults are those of ``nnssl_predict``.

    Attributes:
        device: cpu, cuda or mps; None takes CUDA if there is a device, else the CPU.
        precision: auto, fp32, bf16 or fp16.
        memory_format: auto, contiguous (nnU-Net's results to the bit) or channels_last (faster on CPUs in fp32).
        step_size: distance of neighboring windows as a fraction of the patch size, in (0, 1].
        mirroring: average over mirrored inputs, on the axes that the training allowed.
        save_probabilities: write the class probabilities (npz) and properties (pkl) beside each mask.
        save_uncertainty: write maps of the uncertainty (NIfTI) and estimates of the quality of each case (CSV) into the
            folder ``uncertainty`` of the output.
        continue_prediction: leave out cases whose result is already there; else they are predicted again.
        previous_stage: folder with the masks of the first stage of a cascade.
        num_parts, part_id: predict only each ``num_parts``-th case, beginning with ``part_id``.
        preprocessing_workers, export_workers: background processes; 0 works without any. None takes 3 with a CUDA
            device, and none for a single case or on the CPU, where the network needs the cores.
        on_device: keep the results on the GPU.
        trust_checkpoint: allow checkpoints to run code.
        verbose: nnU-Net's messages, and tracebacks of failed cases.
        progress: progress bars.
    """

    device: str | None = None
    precision: str = "auto"
    memory_format: str = "auto"
    step_size: float = 0.5
    mirroring: bool = True
    save_probabilities: bool = False
    save_uncertainty: bool = False
    continue_prediction: bool = False
    previous_stage: Path | None = None
    num_parts: int = 1
    part_id: int = 0
    preprocessing_workers: int | None = None
    export_workers: int | None = None
    on_device: bool = True
    trust_checkpoint: bool = False
    verbose: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.step_size <= 1:
            raise UserError("-step_size must be above 0 and at most 1", found=self.step_size)
        if self.num_parts < 1 or not 0 <= self.part_id < self.num_parts:
            raise UserError(
                "-part_id must be below -num_parts, counted from 0",
                found=f"-num_parts {self.num_parts} -part_id {self.part_id}",
            )
        for flag, count in (("-npp", self.preprocessing_workers), ("-nps", self.export_workers)):
            if count is not None and count < 0:
                raise UserError(f"{flag} must be 0 or more", found=count)


@dataclass
class PredictionReport:
    """What was done: names of cases, and the wall time of everything after the network was loaded."""

    output: Path
    written: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        count = len(self.written)
        text = f"{count} case{'s' * (count != 1)} written to {self.output}"
        if count:
            text += f" in {self.seconds:.1f} s ({self.seconds / count:.2f} s per case)"
        return text + (f"; {len(self.skipped)} were there already" if self.skipped else "")


def predict(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    model: TrainedModel,
    options: PredictionOptions | None = None,
) -> PredictionReport:
    """Segments the cases in ``inputs`` (folders or files) into the folder ``output``.

    A mask appears under its name only when it is complete, so a run that was killed can be continued. A case that
    fails does not stop the others.

    Raises:
        UserError: for input that does not fit the model, an output folder that would lose files, and, after all
            cases are done, if some of them failed.
    """
    options = options or PredictionOptions()
    output = Path(output)
    dataset_json, ending = model.dataset_json, model.dataset_json["file_ending"]
    channel_names = dataset_json.get("channel_names") or dataset_json["modality"]
    cases = collect_cases(
        inputs, file_ending=ending, channels=len(channel_names), reader=model.plans["image_reader_writer"]
    )[options.part_id :: options.num_parts]
    record = _record(inputs, output, model, options)
    check_output(output, cases, ending, record, options.continue_prediction)
    report = PredictionReport(output)
    if options.continue_prediction:
        report.skipped = [case.name for case in cases if _is_done(case, output, ending, options)]
    todo = [case for case in cases if case.name not in report.skipped]
    if not todo:
        return report
    predictor = _load(model, options)
    stage = predictor.configuration_manager.previous_stage_name
    masks: list[Path | None] = [None] * len(todo)
    if stage is not None:
        masks[:] = previous_stage_files(todo, options.previous_stage, file_ending=ending, stage=stage)
    write_json(record, output / RECORD)
    # nnU-Net's postprocessing and ensembling look for these two beside the masks
    write_json(dataset_json, output / "dataset.json")
    write_json(model.plans, output / "plans.json")
    # a mask that is to be replaced must not look finished if this run is stopped and continued
    for case in todo:
        (output / f"{case.name}{ending}").unlink(missing_ok=True)
        estimates_file(output, case.name).unlink(missing_ok=True)
    pipeline = CasePipeline(
        predictor,
        output,
        save_probabilities=options.save_probabilities,
        save_uncertainty=options.save_uncertainty,
        workers=(options.preprocessing_workers, options.export_workers),
        verbose=options.verbose,
        progress=options.progress,
    )
    begin = time.perf_counter()
    pipeline.run(list(zip(todo, masks, strict=True)))
    report.seconds = time.perf_counter() - begin
    report.written, report.failed = pipeline.written, pipeline.failed
    if options.save_uncertainty and report.written:
        print(f"Estimates of the quality, likely failures first: {collect_quality(output)}")
    if report.failed:
        print(report)
        raise UserError(
            f"{len(report.failed)} of {len(todo)} cases failed",
            found="".join(f"\n    {name}: {reason}" for name, reason in report.failed.items()),
            fix="mend them and run again with --continue_prediction; --verbose shows tracebacks",
        )
    return report


def _load(model: TrainedModel, options: PredictionOptions) -> Predictor:
    # imported here: torch takes seconds to load, and the checks of the input need not wait for it
    import torch

    from nnssl.inference.device import choose_device
    from nnssl.inference.predictor import Predictor

    device = choose_device(options.device)
    predictor = Predictor(
        options.step_size,
        use_mirroring=options.mirroring,
        perform_everything_on_device=options.on_device,
        device=device,
        verbose=options.verbose,
        verbose_preprocessing=options.verbose,
        allow_tqdm=options.progress,
        precision=options.precision,
        memory_format=options.memory_format,
        trust_checkpoint=options.trust_checkpoint,
    )
    where = "the CPU" if device.type == "cpu" else device.type
    if device.type == "cpu" and options.device is None:
        where = "the CPU, since there is no CUDA device"
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    print(f"Predicting on {where} ({predictor.precision.name}{threads})", flush=True)
    predictor.initialize_from_model(model, keep_further=options.save_uncertainty)
    return predictor


def _is_done(case: InputCase, output: Path, ending: str, options: PredictionOptions) -> bool:
    suffixes = [ending, ".npz", ".pkl"] if options.save_probabilities else [ending]
    wanted = [output / f"{case.name}{suffix}" for suffix in suffixes]
    if options.save_uncertainty:
        wanted.append(estimates_file(output, case.name))
    return all(file.is_file() for file in wanted)


def _record(
    inputs: Sequence[str | os.PathLike[str]], output: Path, model: TrainedModel, options: PredictionOptions
) -> dict[str, Any]:
    return {
        "inputs": [os.path.abspath(i) for i in inputs],
        "output": os.path.abspath(output),
        "model_folder": os.path.abspath(model.folder),
        "folds": list(model.folds),
        "checkpoint": model.checkpoint,
        **asdict(options),
    }


def check_output(
    output: Path,
    cases: Sequence[InputCase],
    ending: str,
    record: dict[str, Any],
    continues: bool,
    same: Sequence[str] = _SAME_ON_CONTINUE,
) -> None:
    """Refuses an output folder in which the prediction would overwrite scans or reference labels, or mix two models.

    Args:
        output: the folder.
        cases: to be segmented.
        ending: of the masks.
        record: how they will be made, as it is written to the folder.
        continues: whether masks that are there are kept.
        same: entries of the record that may then not differ.

    Raises:
        UserError: as described.
    """
    if (output.exists() and not output.is_dir()) or output.name.endswith(ending):
        raise UserError("-o is not a folder", found=output, fix="name a folder; each mask gets the name of its case")
    folders = {file.parent.resolve() for case in cases for file in case.files}
    if output.resolve() in folders:
        raise UserError("the output folder is the input folder", found=output, fix="choose another folder with -o")
    present = [f"{case.name}{ending}" for case in cases if (output / f"{case.name}{ending}").exists()]
    recorded = (output / RECORD).is_file()
    if present and not recorded and not continues:
        raise UserError(
            "the output folder holds files with the names of the masks that no prediction wrote",
            where=output,
            found=", ".join(present[:5]) + (f" and {len(present) - 5} more" if len(present) > 5 else ""),
            fix="choose another folder with -o; if the files may go, remove them",
        )
    if present and recorded and continues:
        before = read_json(output / RECORD)
        differing = [key for key in same if before.get(key, record[key]) != record[key]]
        if differing:
            raise UserError(
                "the masks in the output folder were made in another way, so the prediction cannot be continued",
                where=output,
                expected="; ".join(f"{key} {before[key]}" for key in differing),
                found="; ".join(f"{key} {record[key]}" for key in differing),
                fix="choose another folder with -o, or leave out --continue_prediction to predict all cases again",
            )
