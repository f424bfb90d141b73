"""Content keys: whether a case, or the rules it is preprocessed by, have changed since the last run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnssl.dataset.raw import RawDataset
from nnssl.errors import UserError
from nnssl.utils.files import write_json

FORMAT = 1
"""Part of every settings key; raised whenever this package writes preprocessed cases differently."""

# these look at nothing but the image itself, so that new labels do not change what they make of the other cases
_SCHEMES_WITHOUT_DATASET_INTENSITIES = {
    "ZScoreNormalization",
    "NoNormalization",
    "RescaleTo01Normalization",
    "RGBTo01Normalization",
}


@dataclass(frozen=True)
class ContentKeys:
    """Hashes of the files of every case: ``images`` of labeled and unlabeled cases, ``labels`` of labeled ones."""

    images: dict[str, str]
    labels: dict[str, str]

    def of(self, case: str) -> dict[str, str]:
        """``{"image": key}`` of an unlabeled case, ``{"image": key, "label": key}`` of a labeled one."""
        return {"image": self.images[case]} | ({"label": self.labels[case]} if case in self.labels else {})


def content_keys(
    raw: RawDataset, cache_file: str | os.PathLike[str], *, num_threads: int, clean: bool = False
) -> ContentKeys:
    """Content keys of all labeled and unlabeled cases, links followed.

    A file is read again only if its size or one of its times differs from what ``cache_file`` says (as git does), or
    with ``clean``. Labels are read for labeled cases only.
    """
    image_files = {case: files.images for case, files in raw.labeled.items()} | raw.unlabeled
    label_files = {case: [files.label] for case, files in raw.labeled.items()}
    files = [file for names in (*image_files.values(), *label_files.values()) for file in names]
    digests = hash_files(files, Path(cache_file), num_threads=num_threads, clean=clean)
    return ContentKeys(
        images={case: hash_text(*(digests[file] for file in names)) for case, names in image_files.items()},
        labels={case: hash_text(*(digests[file] for file in names)) for case, names in label_files.items()},
    )


def hash_files(files: Iterable[str], cache_file: Path, *, num_threads: int, clean: bool = False) -> dict[str, str]:
    """``{file: hash of its content}``, remembered in ``cache_file``; ``UserError`` for a file that is not there."""
    try:
        known = {} if clean else json.loads(cache_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}  # a lost cache costs time only
    files = list(files)
    with ThreadPoolExecutor(max(num_threads, 1)) as pool:
        hashed = pool.map(lambda file: _hash_file(file, known), files)
        progress = tqdm(hashed, total=len(files), desc="Content keys", unit="file", delay=1, disable=None)
        entries = dict(zip(files, progress, strict=True))
    cache = {os.path.realpath(file): entry for file, entry in entries.items()}
    if cache != known:
        write_json(cache, cache_file)
    return {file: entry["content"] for file, entry in entries.items()}


def settings_key(plans: PlansManager, configuration: ConfigurationManager, labels: dict[str, Any] | None) -> str:
    """Key of everything in the plans that decides how a case is preprocessed.

    Patch size is left out: it shapes the chunks of the stored arrays, which changes the speed of reading only.

    Args:
        plans: the plans.
        configuration: the configuration.
        labels: ``labels`` and ``regions_class_order`` of dataset.json for labeled cases (they decide the sampled
            foreground locations), None for unlabeled cases.
    """
    intensities = plans.foreground_intensity_properties_per_channel
    rules = {
        "format": FORMAT,
        "reader": plans.plans["image_reader_writer"],
        "transpose": plans.transpose_forward,
        "preprocessor": configuration.preprocessor_name,
        "spacing": configuration.spacing,
        "normalization": configuration.normalization_schemes,
        "use_mask_for_norm": configuration.use_mask_for_norm,
        "intensities": {
            str(channel): intensities[str(channel)]
            for channel, scheme in enumerate(configuration.normalization_schemes)
            if scheme not in _SCHEMES_WITHOUT_DATASET_INTENSITIES
        },
        "resampling": {key: value for key, value in configuration.configuration.items() if key in _RESAMPLING_ENTRIES},
        "labels": labels,
    }
    return hash_text(json.dumps(rules, sort_keys=True))


_RESAMPLING_ENTRIES = {
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
}


def _hash_file(file: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    try:
        status = os.stat(file)
        state = {"size": status.st_size, "modified": status.st_mtime_ns, "changed": status.st_ctime_ns}
        before = known.get(os.path.realpath(file))
        if before is not None and all(before.get(name) == value for name, value in state.items()):
            return before
        digest = hashlib.blake2b(digest_size=16)
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError("file cannot be read", where=file, found=error.strerror) from None
    return {**state, "content": digest.hexdigest()}


def hash_text(*parts: str) -> str:
    """Key of some texts."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()
