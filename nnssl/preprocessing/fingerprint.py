"""The data set fingerprint: geometry of all cases, foreground intensities and places of classes of the labeled ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnssl.dataloading.correspondence import Frame
from nnssl.dataset.groups import group_cases, load_groups
from nnssl.dataset.parallel import map_cases
from nnssl.dataset.raw import RawDataset, declared_values
from nnssl.errors import UserError
from nnssl.preprocessing.class_pairs import Pair, PairInCase, combine, pairs_in_case
from nnssl.preprocessing.class_places import (
    WHOLE,
    Grid,
    class_grid,
    compared_pairs,
    foreground_box,
    mean_overlap,
    most_typical,
)
from nnssl.preprocessing.content import ContentKeys
from nnssl.utils.files import read_json, write_json
from nnssl.utils.paths import preprocessed_folder

FINGERPRINT_FILE = "dataset_fingerprint.json"
INTENSITIES = "foreground_intensity_properties_per_channel"
CLASS_PAIRS = "class_pairs"
CLASS_PLACES = "class_places"
FORMAT = 3

# nnU-Net draws 1e8 voxels in all. With a handful of labeled cases that is far more than they have, and gigabytes;
# with 1e6 voxels per case the percentiles stand still in the fourth digit.
SAMPLED_VOXELS = 10_000_000
SAMPLED_VOXELS_PER_CASE = 1_000_000


@dataclass(frozen=True)
class Geometry:
    """What the fingerprint keeps of a case; spacing in mm; axes in the order of the reader."""

    spacing: list[float]
    shape_after_crop: list[int]
    relative_size_after_cropping: float


@dataclass(frozen=True)
class _Analysis:
    geometry: Geometry
    intensities: list[np.ndarray]
    pairs: dict[Pair, PairInCase]
    box: list[list[float]] = field(default_factory=list)
    grids: dict[str, Grid] = field(default_factory=dict)


def make_fingerprint(raw: RawDataset, keys: ContentKeys, *, num_processes: int, clean: bool = False) -> dict[str, Any]:
    """Returns the fingerprint and writes it to ``dataset_fingerprint.json`` in the preprocessed folder.

    Spacings, shapes and relative sizes come from all cases, intensities from the foreground of labeled cases. The
    file has nnU-Net's keys plus ``class_pairs`` (`class_evidence`), ``class_places`` (`class_places`) and
    ``provenance``, by which a later run knows what is still true: only new or changed cases are analyzed, labeled ones
    again only if any of them, the classes or the groups changed.

    Args:
        raw: the data set.
        keys: content keys of its cases.
        num_processes: worker processes.
        clean: analyze every case again.

    Raises:
        UserError: no labeled case has foreground, or a worker died.
    """
    file = preprocessed_folder() / raw.name / FINGERPRINT_FILE
    reader = raw.reader_writer_class()
    previous = None if clean or not file.is_file() else _reusable(read_json(file, fix="delete the file"), reader)
    provenance = previous["provenance"] if previous else {"labeled": {}, "unlabeled": {}}
    classes = class_values(raw.dataset_json["labels"])
    groups = {case: group for case, group in (load_groups(raw) or {}).items() if case in raw.labeled}
    same_labels = (
        {case: keys.of(case) for case in raw.labeled} == _contents(provenance["labeled"])
        and provenance.get("classes") == classes
        and provenance.get("groups") == groups
    )
    if (
        previous
        and same_labels
        and {case: keys.of(case) for case in raw.unlabeled} == _contents(provenance["unlabeled"])
    ):
        return previous

    known = {
        entry["image"]: _geometry(entry) for kind in ("labeled", "unlabeled") for entry in provenance[kind].values()
    }
    per_case = min(SAMPLED_VOXELS // max(len(raw.labeled), 1), SAMPLED_VOXELS_PER_CASE)
    jobs: dict[str, tuple[Any, ...]] = {}
    if not same_labels:
        compared = {case for pair in compared_pairs(group_cases(raw.labeled, groups)) for case in pair}
        jobs |= {
            case: (files.images, files.label, classes, reader, per_case, case in compared)
            for case, files in raw.labeled.items()
        }
    jobs |= {
        case: (images, None, classes, reader, per_case, False)
        for case, images in raw.unlabeled.items()
        if keys.images[case] not in known
    }
    analyzed = map_cases(_analyze, jobs, num_processes=num_processes, description="Fingerprint")
    known |= {keys.images[case]: analysis.geometry for case, analysis in analyzed.items()}

    fingerprint = _assemble({case: known[keys.images[case]] for case in (*raw.labeled, *raw.unlabeled)})
    if previous and same_labels:
        fingerprint |= {name: previous[name] for name in (INTENSITIES, CLASS_PAIRS, CLASS_PLACES)}
    else:
        fingerprint[INTENSITIES] = _intensity_properties([analyzed[case].intensities for case in raw.labeled], raw)
        units = group_cases(raw.labeled, groups)
        fingerprint[CLASS_PAIRS] = {
            "labels": classes,
            "votes_of": "groups of labeled cases" if groups else "labeled cases",
            "pairs": combine([[analyzed[case].pairs for case in unit] for unit in units]),
        }
        fingerprint[CLASS_PLACES] = _class_places(analyzed, units)
    fingerprint["provenance"] = {
        "format": FORMAT,
        "image_reader_writer": reader.__name__,
        "num_labeled": len(raw.labeled),
        "num_unlabeled": len(raw.unlabeled),
        "classes": classes,
        "groups": groups,
        "labeled": {case: keys.of(case) | asdict(known[keys.images[case]]) for case in raw.labeled},
        "unlabeled": {case: keys.of(case) | asdict(known[keys.images[case]]) for case in raw.unlabeled},
    }
    write_json(fingerprint, file)
    return read_json(file)


def case_counts(fingerprint: dict[str, Any]) -> tuple[int, int]:
    """Numbers of labeled and unlabeled cases in a fingerprint; ``UserError`` if nnssl did not make it."""
    provenance = fingerprint.get("provenance")
    if provenance is None:
        raise UserError(
            f"{FINGERPRINT_FILE} was not made by nnssl and knows nothing of unlabeled cases",
            fix="run nnssl_plan_and_preprocess, which makes it again",
        )
    return provenance["num_labeled"], provenance["num_unlabeled"]


def patients_of(fingerprint: dict[str, Any], cases: Iterable[str]) -> int:
    """Number of groups of labeled cases (``groups.json``, usually patients); a case without one stands alone."""
    return len(group_cases(cases, fingerprint.get("provenance", {}).get("groups")))


def class_evidence(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """How alike the classes look and how they lie; ``UserError`` if the fingerprint does not tell.

    ``labels`` (values of the classes), ``votes_of`` (what votes, in words), ``pairs`` (as from
    `nnssl.preprocessing.class_pairs.combine`, axes in the order of the reader).
    """
    if CLASS_PAIRS not in fingerprint:
        raise UserError(
            f"{FINGERPRINT_FILE} does not tell how the classes lie",
            fix="run nnssl_plan_and_preprocess, which makes it again",
        )
    return fingerprint[CLASS_PAIRS]


def class_places(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Where the classes of labeled cases lie; ``UserError`` if the fingerprint does not tell.

    ``boxes`` (of the foreground of each labeled case, in relative coordinates of the reader's axes), ``pairs`` (how
    many were compared), ``overlap`` (``dice`` and ``chance`` in ``relative`` coordinates and in those of the boxes,
    ``bbox``), ``reference`` (the case that overlaps the others best).
    """
    if CLASS_PLACES not in fingerprint:
        raise UserError(
            f"{FINGERPRINT_FILE} does not tell where the classes lie",
            fix="run nnssl_plan_and_preprocess, which makes it again",
        )
    return fingerprint[CLASS_PLACES]


def class_values(labels: dict[str, int | list[int]]) -> list[int]:
    """Label values of all classes in the ``labels`` entry of dataset.json; of regions the values they are made of."""
    return [value for value in declared_values({k: v for k, v in labels.items() if k != "ignore"}) if value > 0]


def _reusable(fingerprint: dict[str, Any], reader: type) -> dict[str, Any] | None:
    provenance = fingerprint.get("provenance", {})
    made_alike = provenance.get("format") == FORMAT and provenance.get("image_reader_writer") == reader.__name__
    return fingerprint if made_alike else None


def _contents(entries: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
    return {
        case: {name: entry[name] for name in ("image", "label") if name in entry} for case, entry in entries.items()
    }


def _geometry(entry: dict[str, Any]) -> Geometry:
    return Geometry(entry["spacing"], entry["shape_after_crop"], entry["relative_size_after_cropping"])


def _analyze(
    images: list[str],
    label: str | None,
    classes: list[int],
    reader_writer_class: type,
    num_samples: int,
    compared: bool,
) -> _Analysis:
    """Geometry of a case and, if it is labeled, sampled foreground intensities, pairs and places of classes."""
    reader = reader_writer_class()
    data, properties = reader.read_images(images)
    segmentation = None if label is None else reader.read_seg(label)[0]
    cropped, segmentation, _ = crop_to_nonzero(data, segmentation)
    shape = cropped.shape[1:]
    geometry = Geometry(
        [float(mm) for mm in properties["spacing"]],
        [int(size) for size in shape],
        float(np.prod(shape) / np.prod(data.shape[1:])),
    )
    if label is None:
        return _Analysis(geometry, [], {})
    samples, _ = DatasetFingerprintExtractor.collect_foreground_intensities(
        segmentation, cropped, num_samples=num_samples
    )
    intensities = [np.asarray(values, dtype=np.float32) for values in samples]
    box = foreground_box(segmentation[0], classes)
    frames = {"relative": Frame.of_box(WHOLE), "bbox": Frame.of_box(box)} if compared else {}
    grids = {kind: class_grid(segmentation[0], classes, frame) for kind, frame in frames.items()}
    return _Analysis(geometry, intensities, pairs_in_case(cropped, segmentation[0], classes), box, grids)


def _class_places(analyzed: dict[str, _Analysis], units: list[list[str]]) -> dict[str, Any]:
    pairs = compared_pairs(units)
    overlap = {
        kind: asdict(mean_overlap([(analyzed[a].grids[kind], analyzed[b].grids[kind]) for a, b in pairs]))
        for kind in ("relative", "bbox")
    }
    relative = {case: analyzed[case].grids["relative"] for pair in pairs for case in pair}
    return {
        "boxes": {case: analyzed[case].box for unit in units for case in unit},
        "pairs": len(pairs),
        "overlap": overlap,
        "reference": most_typical(relative, pairs) if pairs else units[0][0],
    }


def _assemble(geometries: dict[str, Geometry]) -> dict[str, Any]:
    cases = geometries.values()
    return {
        "spacings": [case.spacing for case in cases],
        "shapes_after_crop": [case.shape_after_crop for case in cases],
        "median_relative_size_after_cropping": float(np.median([case.relative_size_after_cropping for case in cases])),
    }


def _intensity_properties(samples: list[list[np.ndarray]], raw: RawDataset) -> dict[str, dict[str, float]]:
    properties = {}
    for channel in range(raw.num_channels):
        values = np.concatenate([case[channel] for case in samples])
        if values.size == 0:
            raise UserError(
                "no labeled case has a foreground voxel", where=raw.folder / "labelsTr", fix="label at least one case"
            )
        low, median, high = np.percentile(values, (0.5, 50.0, 99.5))
        properties[str(channel)] = {
            "mean": float(np.mean(values, dtype=np.float64)),
            "median": float(median),
            "std": float(np.std(values, dtype=np.float64)),
            "min": float(values.min()),
            "max": float(values.max()),
            "percentile_99_5": float(high),
            "percentile_00_5": float(low),
        }
    return properties
