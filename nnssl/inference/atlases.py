"""Prediction without training: labeled cases are registered to each scan and their labels are fused (SimpleITK)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from numpy.typing import NDArray

from nnssl.dataset.parallel import map_cases
from nnssl.dataset.raw import LabeledCase, RawDataset
from nnssl.errors import UserError
from nnssl.inference.cases import InputCase, collect_cases
from nnssl.inference.fusion import local_similarity, weighted_vote
from nnssl.inference.run import RECORD, PredictionReport, check_output
from nnssl.preprocessing.registration import AlignmentKind, as_image, register
from nnssl.utils.files import atomic_path, write_json

Fusion = Literal["local", "majority"]


@dataclass(frozen=True)
class AtlasOptions:
    """How atlases predict; the defaults are those of ``nnssl_atlas_predict``.

    Attributes:
        fusion: ``local`` weighs each atlas by how alike it is around a voxel, ``majority`` counts votes; equal ones are
            decided by the atlas that is more alike as a whole.
        transform: ``affine``, or ``deformable`` after it.
        atlases: names of labeled cases; none for all.
        continue_prediction: leave out cases whose mask is already there.
        num_processes: worker processes; each registers one scan at a time.
    """

    fusion: Fusion = "local"
    transform: AlignmentKind = "deformable"
    atlases: tuple[str, ...] = ()
    continue_prediction: bool = False
    num_processes: int = 1


def predict_by_atlases(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    raw: RawDataset,
    options: AtlasOptions | None = None,
) -> PredictionReport:
    """Segments the cases in ``inputs`` (folders or files) with the labeled cases of a data set.

    A mask appears under its name only when it is complete, so a run that was killed can be continued. A case that
    fails does not stop the others. A case that is an atlas itself is segmented by the other ones.

    Raises:
        UserError: for unknown atlases, input that does not fit the data set, an output folder that would lose files,
            and, after all cases are done, if some of them failed.
    """
    options = options or AtlasOptions()
    output, ending, reader = Path(output), raw.file_ending, raw.reader_writer_class()
    atlases = _atlases(raw, options)
    cases = collect_cases(inputs, file_ending=ending, channels=raw.num_channels, reader=reader.__name__)
    record = {
        "inputs": [os.path.abspath(i) for i in inputs],
        "output": os.path.abspath(output),
        "dataset": raw.name,
        **asdict(options),
        "atlases": list(atlases),
    }
    continues = options.continue_prediction
    check_output(output, cases, ending, record, continues, ("dataset", "fusion", "transform", "atlases"))
    report = PredictionReport(output)
    if continues:
        report.skipped = [case.name for case in cases if (output / f"{case.name}{ending}").is_file()]
    todo = [case for case in cases if case.name not in report.skipped]
    output.mkdir(parents=True, exist_ok=True)
    write_json(record, output / RECORD)
    write_json(raw.dataset_json, output / "dataset.json")
    for case in todo:
        (output / f"{case.name}{ending}").unlink(missing_ok=True)
    segmenter = AtlasSegmenter(atlases, reader, raw.ignore_label, output, ending, options.fusion, options.transform)
    begin = time.perf_counter()
    faults = map_cases(
        segmenter,
        {case.name: (case,) for case in todo},
        num_processes=options.num_processes,
        description="Registration",
    )
    report.seconds = time.perf_counter() - begin
    report.failed = {name: fault for name, fault in faults.items() if fault}
    report.written = [case.name for case in todo if case.name not in report.failed]
    if report.failed:
        print(report)
        raise UserError(
            f"{len(report.failed)} of {len(todo)} cases failed",
            found="".join(f"\n    {name}: {reason}" for name, reason in report.failed.items()),
            fix="mend them and run again with --continue_prediction",
        )
    return report


def _atlases(raw: RawDataset, options: AtlasOptions) -> dict[str, LabeledCase]:
    names = options.atlases or tuple(raw.labeled)
    unknown = [name for name in names if name not in raw.labeled]
    if unknown or not names:
        raise UserError(
            "no labeled case to register" if not names else "not a labeled case",
            where=raw.folder,
            expected=", ".join(raw.labeled) or None,
            found=", ".join(unknown) or None,
        )
    return {name: raw.labeled[name] for name in names}


@dataclass
class AtlasSegmenter:
    """Segments single scans; sent once to every worker.

    Args:
        atlases: labeled cases by name.
        reader: nnU-Net's reader class.
        ignore_label: of the labels; such voxels of an atlas have no vote.
        output: folder for the masks.
        ending: of their files.
        fusion: see `AtlasOptions`.
        transform: see `AtlasOptions`.
    """

    atlases: dict[str, LabeledCase]
    reader: type
    ignore_label: int | None
    output: Path
    ending: str
    fusion: Fusion
    transform: AlignmentKind

    def __call__(self, case: InputCase) -> str | None:
        """Writes the mask of a case; returns why it could not be made, or None."""
        # the workers share the cores among them
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        try:
            data, properties = self.reader().read_images([str(file) for file in case.files])
            mask = self.segment(case.name, data, [float(mm) for mm in properties["spacing"]])
        except RuntimeError as error:  # of ITK and of nnU-Net's readers
            return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        except UserError as error:
            return str(error)
        with atomic_path(self.output / f"{case.name}{self.ending}") as temporary:
            self.reader().write_seg(mask, str(temporary), properties)
        return None

    def segment(self, name: str, data: NDArray[Any], spacing: Sequence[float]) -> NDArray[np.int16]:
        """Labels ``(*S)`` of a scan ``(C, *S)``, whose first channel is registered within its nonzero region.

        Args:
            name: of the case; an atlas of this name is left out.
            data: the scan.
            spacing: in mm, in the order of the axes.
        """
        if not data.any():
            raise UserError("the scan is empty: all voxels are 0")
        cropped, _, box = crop_to_nonzero(data)
        target = as_image(cropped[0], list(spacing))
        proposals = [self._propose(target, *read) for atlas, read in self._read.items() if atlas != name]
        if not proposals:
            raise UserError("the scan is the only atlas, which cannot segment itself", fix="name other atlases")
        array = sitk.GetArrayFromImage(target)
        # the most alike first: it decides between equal votes
        proposals.sort(key=lambda proposal: float(np.square(proposal[0] - array).mean()))
        images, labels = [list(part) for part in zip(*proposals, strict=True)]
        local = self.fusion == "local"
        weights = local_similarity(array, images) if local else [np.ones_like(array)] * len(images)
        if self.ignore_label is not None:
            weights = [np.where(one == self.ignore_label, 0, w) for one, w in zip(labels, weights, strict=True)]
        mask = np.zeros(data.shape[1:], np.int16)
        inside = tuple(slice(*edges) for edges in box)
        mask[inside] = weighted_vote(labels, weights).reshape(cropped.shape[1:])
        return mask

    @cached_property
    def _read(self) -> dict[str, tuple[sitk.Image, sitk.Image]]:
        """First channel and labels of every atlas, within the nonzero region."""
        reader, found = self.reader(), {}
        for name, (images, label) in self.atlases.items():
            data, properties = reader.read_images(images)
            data, labels, _ = crop_to_nonzero(data, reader.read_seg(label)[0])
            spacing = [float(mm) for mm in properties["spacing"]]
            # nnU-Net marks the outside by -1
            found[name] = as_image(data[0], spacing), as_image(np.maximum(labels[0], 0), spacing)
        return found

    def _propose(
        self, target: sitk.Image, image: sitk.Image, labels: sitk.Image
    ) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        """Image and labels of an atlas on the grid of the target, with the target's range of intensities."""
        transform = register(target, image, self.transform, fine=True)
        moved = sitk.Resample(image, target, transform, useNearestNeighborExtrapolator=True)
        moved = sitk.HistogramMatching(moved, target, numberOfHistogramLevels=256, numberOfMatchPoints=15)
        propagated = sitk.Resample(labels, target, transform, sitk.sitkNearestNeighbor, 0.0)
        return sitk.GetArrayFromImage(moved), sitk.GetArrayFromImage(propagated).astype(np.int16)
