"""Prediction of a folder of scans: checks, preprocessing, network, export, with every failure named by its case."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnssl.errors import UserError
from nnssl.inference.cases import InputCase, collect_cases, previous_stage_files
from nnssl.inference.contents import checkpoint_content
from nnssl.inference.models import TrainedModel
from nnssl.inference.output import (
    case_contents,
    check_output,
    made_of_the_same,
    refuse_unrecorded,
    remove_masks,
    write_record,
)
from nnssl.inference.pipeline import CasePipeline
from nnssl.inference.quality import collect_quality, estimates_file, has_estimates
from nnssl.utils.files import write_json

if TYPE_CHECKING:
    from nnssl.inference.predictor import Predictor

_SAME = ("model_folder", "folds", "checkpoint", "checkpoint_contents", "step_size", "mirroring", "precision")


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
        continue_prediction: leave out cases whose result is already there and was made from the same files; else all
            are predicted again.
        previous_stage: folder with the masks of the first stage of a cascade.
        num_parts, part_id: predict only each ``num_parts``-th case, beginning with ``part_id``.
        preprocessing_workers, export_workers: background processes; 0 works without any. None takes 3 with a CUDA
            device, and none for a single case or on the CPU, where the network needs the cores.
        on_device: keep the results on the GPU.
        allow_suspicious: take NaN and infinite values in NIfTI files for 0; else such a case fails.
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
    allow_suspicious: bool = False
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
    fails does not stop the others. With a mask that is replaced goes what was made of it: probabilities, maps and
    estimates of the uncertainty, and ``summary.json`` and ``summary.csv`` of an evaluation.

    Raises:
        UserError: for input that does not fit the model, an output folder that would lose files or hold masks of two
            models, and, after all cases are done, if some of them failed.
    """
    options = options or PredictionOptions()
    output = Path(output)
    dataset_json, ending = model.dataset_json, model.dataset_json["file_ending"]
    channel_names = dataset_json.get("channel_names") or dataset_json["modality"]
    everything = collect_cases(
        inputs, file_ending=ending, channels=len(channel_names), reader=model.plans["image_reader_writer"]
    )
    cases = everything[options.part_id :: options.num_parts]
    record = _record(inputs, output, model, options)
    check_output(output, cases, ending, record, options.continue_prediction, _SAME)
    contents = case_contents(everything, options.previous_stage, ending)
    report = PredictionReport(output)
    if options.continue_prediction:
        report.skipped = _done(cases, output, ending, options, contents)
    skipped = set(report.skipped)
    todo = [case for case in cases if case.name not in skipped]
    if not todo:
        _tell_quality(output, options)
        return report
    refuse_unrecorded(output, [case.name for case in todo], ending)
    predictor = _load(model, options)
    stage = predictor.configuration_manager.previous_stage_name
    masks: list[Path | None] = [None] * len(todo)
    if stage is not None:
        masks[:] = previous_stage_files(todo, options.previous_stage, file_ending=ending, stage=stage)
    # a mask that is to be replaced must not look finished if this run is stopped and continued
    remove_masks(output, [case.name for case in todo], ending)
    write_record(output, record, contents, ending)
    # nnU-Net's postprocessing and ensembling look for these two beside the masks
    write_json(dataset_json, output / "dataset.json")
    write_json(model.plans, output / "plans.json")
    pipeline = CasePipeline(
        predictor,
        output,
        save_probabilities=options.save_probabilities,
        save_uncertainty=options.save_uncertainty,
        not_finite_is_zero=options.allow_suspicious,
        workers=(options.preprocessing_workers, options.export_workers),
        verbose=options.verbose,
        progress=options.progress,
    )
    begin = time.perf_counter()
    pipeline.run(list(zip(todo, masks, strict=True)))
    report.seconds = time.perf_counter() - begin
    report.written, report.failed = pipeline.written, pipeline.failed
    _tell_quality(output, options)
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


def _done(
    cases: Sequence[InputCase], output: Path, ending: str, options: PredictionOptions, contents: Mapping[str, str]
) -> list[str]:
    found = [case.name for case in cases if _is_done(case, output, ending, options)]
    what = "scan" if options.previous_stage is None else "scan or first-stage mask"
    return made_of_the_same(output, found, contents, what)


def _tell_quality(output: Path, options: PredictionOptions) -> None:
    # also where nothing was to do: the run that made the last case may have been killed before it came here
    if options.save_uncertainty and has_estimates(output):
        print(f"Estimates of the quality, likely failures first: {collect_quality(output)}")


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
        "checkpoint_contents": [checkpoint_content(file) for file in model.checkpoint_files()],
        **asdict(options),
    }
