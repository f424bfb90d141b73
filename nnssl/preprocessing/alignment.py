"""Alignment of all labeled cases to a common space, which says where positions of two cases correspond.

Not images are stored in the common space but, for each case, where the points of that space lie in it: patches are cut
from the cases as they are, so that neither images nor labels are interpolated and the shapes that differ between cases
stay in the training. What is exact is the place of the middle of a patch.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from numpy.typing import NDArray

from nnssl.dataloading.correspondence import Frame, Kind
from nnssl.dataset.groups import group_cases, load_groups
from nnssl.dataset.parallel import map_cases
from nnssl.dataset.raw import RawDataset
from nnssl.dataset.volumes import direction_of
from nnssl.errors import UserError
from nnssl.preprocessing.class_places import Grid, class_grid, compared_pairs, mean_overlap
from nnssl.preprocessing.content import ContentKeys, hash_text
from nnssl.preprocessing.fingerprint import FINGERPRINT_FILE, class_places, class_values
from nnssl.preprocessing.manifest import Manifest
from nnssl.preprocessing.registration import AlignmentKind, as_image, register, relative_direction, turned
from nnssl.utils.files import atomic_path, read_json, write_json
from nnssl.utils.paths import preprocessed_folder

ALIGNMENT_FOLDER = "alignment"
_SUMMARY, _MANIFEST = "alignment.json", "manifest.json"
_FORMAT = 2
_GRID = 24
"""Points along each axis of the common space at which a displacement is stored."""


Channel: TypeAlias = tuple[NDArray[Any], list[float]]
"""One channel ``(*S)`` and its spacing in mm, in the order of its axes."""


@dataclass
class CaseAligner:
    """Aligns single cases to a reference; sent once to every worker.

    Args:
        reference: image files of the reference case.
        kind: of the transforms.
        reader: nnU-Net's reader class.
        manifest: its folder receives the files.
    """

    reference: list[str]
    kind: AlignmentKind
    reader: type
    manifest: Manifest

    def __call__(self, case: str, images: list[str], content: dict[str, str]) -> None:
        """Writes the frame of a case and records it."""
        import SimpleITK as sitk

        # the workers share the cores among them
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        try:
            (reference, fixed), (case_image, moving) = self._read(self.reference), self._read(images)
            flat = reference[0].shape[0] == 1
            frame = frame_of(reference, case_image, self.kind, relative_direction(fixed, moving, 2 if flat else 3))
        except RuntimeError as error:  # of ITK
            raise UserError(
                "a labeled case cannot be aligned to another",
                where=f"case {case}, to {Path(self.reference[0]).name}",
                found=str(error).strip().splitlines()[-1],
                fix="leave --align-atlases out",
            ) from None
        file = self.manifest.folder / f"{case}.npz"
        arrays = {name: value for name, value in vars(frame).items() if value is not None}
        with atomic_path(file) as temporary, open(temporary, "wb") as stream:
            np.savez(stream, **arrays)
        self.manifest.add(case, content, {file.name: file.stat().st_size})

    def _read(self, images: list[str]) -> tuple[Channel, NDArray[np.floating] | None]:
        """First channel within its nonzero region, and its direction."""
        data, properties = self.reader().read_images(images)
        channel = crop_to_nonzero(data)[0][0], [float(mm) for mm in properties["spacing"]]
        return channel, direction_of(properties)


def frame_of(
    reference: Channel, case: Channel, kind: AlignmentKind, direction: NDArray[np.floating] | None = None
) -> Frame:
    """How a case lies in the space of the reference.

    Args:
        reference: one channel ``(*S)`` and its spacing in mm.
        case: the same of the case.
        kind: ``affine``, or ``deformable`` with a displacement.
        direction: of the case seen along the axes of the reference, see `relative_direction`; None if it is the same.
    """
    transform = register(as_image(*reference), turned(as_image(*case), direction), kind)
    flat = transform.GetDimension() == 2

    def placed(points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Relative positions ``(N, 3)`` in the case of those in the reference."""
        image, spacing = reference
        millimeters = (points * image.shape - 0.5) * spacing
        moved = np.array([transform.TransformPoint(p[::-1].tolist()) for p in millimeters[:, flat:]])
        # along the axes of the case
        moved = (moved if direction is None else moved @ direction)[:, ::-1]
        image, spacing = case
        found = (moved / spacing[flat:] + 0.5) / image.shape[flat:]
        return np.c_[points[:, :1], found] if flat else found

    if kind == "affine":
        origin, *ends = placed(np.r_[np.zeros((1, 3)), np.eye(3)])
        return Frame(np.c_[np.array(ends).T - origin[:, None], origin])
    steps = (np.arange(_GRID) + 0.5) / _GRID
    axes = [np.array([0.5]) if flat and axis == 0 else steps for axis in range(3)]
    points = np.array(list(product(*axes)))
    found = placed(points)
    # the affine map that comes nearest, so that what is left is small and smooth
    known = np.c_[points, np.ones(len(points))]
    matrix = np.asarray(np.linalg.lstsq(known, found, rcond=None)[0].T, np.float64)
    if flat:
        matrix[0] = [1, 0, 0, 0]
    displacement = (found - known @ matrix.T).T.reshape(3, *map(len, axes))
    return Frame(matrix, displacement)


def align_cases(
    raw: RawDataset, keys: ContentKeys, kind: AlignmentKind | Literal["none"] | None, *, num_processes: int, clean: bool
) -> int:
    """Aligns the labeled cases that are new or changed; returns how many these are.

    The common space is that of the labeled case that overlaps the others best; see `class_places` of the fingerprint.

    Args:
        raw: the data set, whose fingerprint exists.
        keys: content keys of its cases.
        kind: of the transforms; None keeps what is there up to date, ``none`` removes it.
        num_processes: worker processes.
        clean: align every case again.

    Raises:
        UserError: there are fewer than two labeled cases to align.
    """
    dataset_folder = preprocessed_folder() / raw.name
    folder = dataset_folder / ALIGNMENT_FOLDER
    if kind == "none":
        shutil.rmtree(folder, ignore_errors=True)
    summary = alignment_summary(dataset_folder)
    kind = summary["kind"] if kind is None and summary else kind
    if kind is None or kind == "none":
        return 0
    if len(raw.labeled) < 2:
        raise UserError(
            "there is nothing to align", where=raw.folder, expected="two labeled cases", fix="leave --align-atlases out"
        )
    fingerprint = read_json(dataset_folder / FINGERPRINT_FILE, fix="run nnssl_plan_and_preprocess")
    reference = class_places(fingerprint)["reference"]
    settings = hash_text(str(_FORMAT), kind, reference, keys.images[reference])
    manifest = Manifest.open(folder / _MANIFEST, folder, settings)
    contents = {case: {"image": keys.images[case]} for case in raw.labeled}
    finished = {case for case in raw.labeled if not clean and manifest.holds(case, contents[case])}
    manifest.keep_only(finished)
    align = CaseAligner(raw.labeled[reference].images, kind, raw.reader_writer_class(), manifest)
    jobs = {case: (case, files.images, contents[case]) for case, files in raw.labeled.items() if case not in finished}
    map_cases(align, jobs, num_processes=num_processes, description=f"Alignment ({kind})")
    Manifest.open(folder / _MANIFEST, folder, settings).keep_only(set(raw.labeled))
    labels = {case: keys.labels[case] for case in raw.labeled}
    if jobs or summary is None or summary["labels"] != labels:
        overlap = _overlap(raw, folder, num_processes)
        write_json({"kind": kind, "reference": reference, "overlap": overlap, "labels": labels}, folder / _SUMMARY)
    return len(jobs)


def alignment_summary(dataset_folder: Path) -> dict[str, Any] | None:
    """What `align_cases` did: ``kind``, ``reference``, ``overlap`` (``dice`` and ``chance``); None if nothing."""
    file = dataset_folder / ALIGNMENT_FOLDER / _SUMMARY
    return read_json(file, fix="delete the folder") if file.is_file() else None


def load_frames(
    dataset_folder: Path, kind: Kind, cases: Sequence[str], transpose_forward: Sequence[int]
) -> Mapping[str, Frame]:
    """Frames of labeled cases by the axes of the preprocessed arrays; none for relative coordinates.

    Args:
        dataset_folder: preprocessed folder of the data set.
        kind: where positions correspond.
        cases: names of the cases.
        transpose_forward: nnU-Net's, the reader's axis for each axis of the preprocessed arrays.

    Raises:
        UserError: what ``kind`` needs was not made for one of the cases.
    """
    if kind == "relative":
        return {}
    if kind == "bbox":
        file = dataset_folder / FINGERPRINT_FILE
        boxes = class_places(read_json(file, fix="run nnssl_plan_and_preprocess"))["boxes"]
        known = {case: Frame.of_box(boxes[case]) for case in cases if case in boxes}
    else:
        file = dataset_folder / ALIGNMENT_FOLDER
        known = {case: read_frame(file / f"{case}.npz") for case in cases if (file / f"{case}.npz").is_file()}
    missing = [case for case in cases if case not in known]
    if missing:
        raise UserError(
            f"it is not known where positions correspond by {kind}",
            where=file,
            found=f"nothing about case {missing[0]}",
            fix="run nnssl_plan_and_preprocess again"
            + (" with --align-atlases affine (or deformable)" if kind == "registration" else ""),
        )
    return {case: frame.transposed(transpose_forward) for case, frame in known.items()}


def read_frame(file: Path) -> Frame:
    """A frame that `CaseAligner` wrote, by the axes of the reader."""
    with np.load(file) as arrays:
        return Frame(**arrays)


def _overlap(raw: RawDataset, folder: Path, num_processes: int) -> dict[str, float]:
    pairs = compared_pairs(group_cases(raw.labeled, load_groups(raw) or {}))
    classes = class_values(raw.dataset_json["labels"])
    reader = raw.reader_writer_class()
    jobs = {
        case: (raw.labeled[case].images, raw.labeled[case].label, classes, reader, folder / f"{case}.npz")
        for case in sorted({case for pair in pairs for case in pair})
    }
    grids = map_cases(_aligned_grid, jobs, num_processes=num_processes, description="Overlap")
    return asdict(mean_overlap([(grids[a], grids[b]) for a, b in pairs]))


def _aligned_grid(images: list[str], label: str, classes: list[int], reader_writer_class: type, frame: Path) -> Grid:
    reader = reader_writer_class()
    data, _ = reader.read_images(images)
    _, segmentation, _ = crop_to_nonzero(data, reader.read_seg(label)[0])
    return class_grid(segmentation[0], classes, read_frame(frame))
