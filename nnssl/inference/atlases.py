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

from nnssl.dataset.groups import refuse_repeated
from nnssl.dataset.parallel import map_cases
from nnssl.dataset.raw import LabeledCase, RawDataset
from nnssl.dataset.volumes import UnusableFile, direction_of
from nnssl.errors import UserError
from nnssl.inference.atlas_files import check_atlases, own_atlases, without_contrast
from nnssl.inference.cases import InputCase, collect_cases
from nnssl.inference.completeness import scan_fault
from nnssl.inference.fusion import local_similarity, weighted_vote
from nnssl.inference.output import (
    case_contents,
    check_output,
    made_of_the_same,
    refuse_unrecorded,
    remove_masks,
    write_record,
)
from nnssl.inference.run import PredictionReport
from nnssl.inference.workers import check_written
from nnssl.preprocessing.registration import AlignmentKind, as_image, register, relative_direction, turned
from nnssl.utils.files import atomic_folder_path, write_json

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
        allow_suspicious: take NaN and infinite values in NIfTI files for 0, as nnU-Net does; else they are refused.
    """

    fusion: Fusion = "local"
    transform: AlignmentKind = "deformable"
    atlases: tuple[str, ...] = ()
    continue_prediction: bool = False
    num_processes: int = 1
    allow_suspicious: bool = False


def predict_by_atlases(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    raw: RawDataset,
    options: AtlasOptions | None = None,
) -> PredictionReport:
    """Segments the cases in ``inputs`` (folders or files) with the labeled cases of a data set.

    A mask appears under its name only when it is complete, so a run that was killed can be continued. A case that
    fails does not stop the others. A case that is an atlas itself, by the content of its file, is segmented by the
    other ones. Registration begins with the directions of the images, where their format has them.

    Raises:
        UserError: for unknown or defective atlases, input that does not fit the data set, an output folder that would
            lose files, and, after all cases are done, if some of them failed.
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
    contents = case_contents(cases, None, ending)
    if continues:
        done = [case.name for case in cases if (output / f"{case.name}{ending}").is_file()]
        report.skipped = made_of_the_same(output, done, contents)
    todo = [case for case in cases if case.name not in report.skipped]
    own: dict[str, tuple[str, ...]] = {}
    if todo:
        processes = options.num_processes
        check_atlases(raw, atlases, allow_suspicious=options.allow_suspicious, num_processes=processes)
        own = own_atlases(todo, atlases)
        for name in filter(own.get, own):
            print(f"{name}: left out as an atlas, being the same scan: {', '.join(own[name])}")
    names = [case.name for case in todo]
    refuse_unrecorded(output, names, ending)
    output.mkdir(parents=True, exist_ok=True)
    remove_masks(output, names, ending)
    write_record(output, record, contents, ending)
    write_json(raw.dataset_json, output / "dataset.json")
    how = (options.fusion, options.transform, options.allow_suspicious)
    segmenter = AtlasSegmenter(atlases, reader, raw.ignore_label, output, ending, *how)
    begin = time.perf_counter()
    faults = map_cases(
        segmenter,
        {case.name: (case, own[case.name]) for case in todo},
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
    refuse_repeated("--atlases", options.atlases)
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
        allow_suspicious: see `AtlasOptions`.
    """

    atlases: dict[str, LabeledCase]
    reader: type
    ignore_label: int | None
    output: Path
    ending: str
    fusion: Fusion
    transform: AlignmentKind
    allow_suspicious: bool = False

    def __call__(self, case: InputCase, without: Sequence[str] = ()) -> str | None:
        """Writes the mask of a case, without some of the atlases; returns why it could not be made, or None."""
        # the workers share the cores among them
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        try:
            data, properties = self._scan(case.files)
            spacing = [float(mm) for mm in properties["spacing"]]
            mask = self.segment(data, spacing, direction_of(properties), without)
        except UserError as error:
            return str(error)
        except Exception as error:  # of ITK and of nnU-Net's readers, of many kinds
            return _reason(error)
        try:
            with atomic_folder_path(self.output / f"{case.name}{self.ending}") as temporary:
                self.reader().write_seg(mask, str(temporary), properties)
                check_written(Path(temporary))
        except RuntimeError as error:
            return _reason(error)
        return None

    def _scan(self, files: Sequence[Path]) -> tuple[NDArray[Any], dict[str, Any]]:
        if fault := scan_fault(files, not_finite_is_zero=self.allow_suspicious):
            raise UserError(fault)
        data, properties = self.reader().read_images([str(file) for file in files])
        if not np.isfinite(data).all():
            raise UserError("the scan holds NaN or infinite values", fix="replace them in the file")
        return data, properties

    def segment(
        self,
        data: NDArray[Any],
        spacing: Sequence[float],
        direction: NDArray[np.floating] | None = None,
        without: Sequence[str] = (),
    ) -> NDArray[np.int16]:
        """Labels ``(*S)`` of a scan ``(C, *S)``, whose first channel is registered within its nonzero region.

        Args:
            data: the scan.
            spacing: in mm, in the order of the axes.
            direction: unit vectors of the axes in columns, in file order (x, y, z); None if the format has none.
            without: names of atlases that are left out.

        Raises:
            UserError: the scan has nothing to register, there is no atlas for it, or ITK refuses to register one.
        """
        if not data.any():
            raise UserError("the scan is empty: all voxels are 0")
        cropped, _, box = crop_to_nonzero(data)
        if cropped[0].min() == cropped[0].max():
            raise UserError(without_contrast(cropped[0]))
        target = as_image(cropped[0], list(spacing))
        used = [name for name in self.atlases if name not in without]
        if not used:
            raise UserError("the scan is the only atlas, which cannot segment itself", fix="name other atlases")
        proposals = [self._propose(target, direction, name) for name in used]
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
    def _read(self) -> dict[str, tuple[sitk.Image, sitk.Image, NDArray[np.floating] | None]]:
        """First channel and labels of every atlas, within the nonzero region, and its direction."""
        reader, found = self.reader(), {}
        for name, (images, label) in self.atlases.items():
            data, properties = reader.read_images(images)
            data, labels, _ = crop_to_nonzero(data, reader.read_seg(label)[0])
            spacing = [float(mm) for mm in properties["spacing"]]
            # nnU-Net marks the outside by -1
            parts = as_image(data[0], spacing), as_image(np.maximum(labels[0], 0), spacing)
            found[name] = (*parts, direction_of(properties))
        return found

    def _propose(
        self, target: sitk.Image, direction: NDArray[np.floating] | None, atlas: str
    ) -> tuple[NDArray[np.float32], NDArray[np.int16]]:
        """Image and labels of an atlas on the grid of the target, with the target's range of intensities."""
        image, labels, own = self._read[atlas]
        dimension = target.GetDimension()
        if dimension != image.GetDimension():
            raise UserError(
                "the scan and the atlases differ in dimension",
                expected=f"{image.GetDimension()}D, as the labeled cases",
                found=f"{dimension}D" + (": one slice that is not empty" if dimension == 2 else ""),
            )
        relative = relative_direction(direction, own, dimension)
        image, labels = turned(image, relative), turned(labels, relative)
        try:
            transform = register(target, image, self.transform, fine=True)
            moved = sitk.Resample(image, target, transform, useNearestNeighborExtrapolator=True)
            moved = sitk.HistogramMatching(moved, target, numberOfHistogramLevels=256, numberOfMatchPoints=15)
            propagated = sitk.Resample(labels, target, transform, sitk.sitkNearestNeighbor, 0.0)
        except RuntimeError as error:  # of ITK
            raise UserError("an atlas cannot be registered to the scan", where=atlas, found=_reason(error)) from None
        return sitk.GetArrayFromImage(moved), sitk.GetArrayFromImage(propagated).astype(np.int16)


def _reason(error: Exception) -> str:
    """The last line of an error, where ITK puts the cause; its type, too, unless it is one of ITK."""
    text = (str(error).strip().splitlines() or [""])[-1].strip()
    kind = "" if isinstance(error, (RuntimeError, UnusableFile)) and text else type(error).__name__
    return ": ".join(part for part in (kind, text) if part)
