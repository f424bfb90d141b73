"""Pseudo-labels of whole unlabeled cases on disk, and training patches of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnssl.dataloading.cases import UnlabeledCases, open_memory_mapped
from nnssl.dataloading.rows import RowsLoader
from nnssl.preprocessing.class_places import foreground_box
from nnssl.utils.disk import disk_errors_named
from nnssl.utils.files import atomic_path

_LOCATIONS, _FACTS, _BOX = "class_locations", "facts", "foreground_box"


class PseudoLabels:
    """Folder with a compressed file per case: labels in preprocessed space, where the classes are, and some facts.

    A file is whole or not there, so that whoever fills the folder may be killed at any time and go on.

    Args:
        folder: made when the first case is written.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)

    def __contains__(self, case: str) -> bool:
        return self._file(case).is_file()

    def write(
        self,
        case: str,
        labels: np.ndarray,
        label_manager: LabelManager,
        patch_size: Sequence[int],
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Writes the pseudo-label of a case atomically.

        Args:
            case: its name.
            labels: ``(1, *S)``, integers; -1 as in nnU-Net's files is background outside the nonzero region.
            label_manager: nnU-Net's; its foreground classes or regions are located for patches that show them.
            patch_size: of the training, for which the file is laid out.
            facts: numbers about the case that are kept with it.
        """
        labels = labels.astype(np.int8 if labels.max() <= 127 else np.int16)
        wanted = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
        located = DefaultPreprocessor._sample_foreground_locations(labels, wanted)
        blocks, chunks = comp_blosc2_params(labels.shape, tuple(patch_size), labels.itemsize)
        parameters = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1}
        with atomic_path(self._file(case)) as temporary, disk_errors_named(self.folder):
            array = blosc2.asarray(labels, urlpath=str(temporary), chunks=chunks, blocks=blocks, cparams=parameters)
            array.schunk.vlmeta[_FACTS] = dict(facts or {})
            array.schunk.vlmeta[_BOX] = foreground_box(labels[0], _classes(labels))
            array.schunk.vlmeta[_LOCATIONS] = [
                (list(key) if isinstance(key, tuple) else key, np.asarray(voxels, np.int32).tobytes())
                for key, voxels in located.items()
            ]
            del array

    def labels(self, case: str) -> Any:
        """Memory-mapped labels ``(1, *S)``."""
        return open_memory_mapped(self._file(case))

    def facts(self, case: str) -> dict[str, Any]:
        """What was written with the case."""
        labels = self.labels(case)  # held, since its metadata end with it
        return dict(labels.schunk.vlmeta[_FACTS])

    def box(self, case: str) -> list[list[float]]:
        """`foreground_box` of all classes of the case."""
        labels = self.labels(case)  # held, since its metadata end with it
        if _BOX in labels.schunk.vlmeta:
            return list(labels.schunk.vlmeta[_BOX])
        return foreground_box(labels[:][0], _classes(labels[:]))  # written by an earlier version

    @staticmethod
    def class_locations(labels: Any) -> dict[int | tuple[int, ...], np.ndarray]:
        """Voxels ``(n, 1 + dimensions)`` of each foreground class or region in what `labels` returned, sampled."""
        return {
            tuple(key) if isinstance(key, list) else key: np.frombuffer(voxels, np.int32).reshape(-1, labels.ndim)
            for key, voxels in labels.schunk.vlmeta[_LOCATIONS]
        }

    def _file(self, case: str) -> Path:
        return self.folder / f"{case}.b2nd"


class PseudoLabeledCases:
    """Unlabeled images with pseudo-labels, in the form of nnU-Net's labeled data sets.

    Args:
        images: the images.
        pseudo_labels: of all ``identifiers``.
        identifiers: the cases that are used.
    """

    def __init__(self, images: UnlabeledCases, pseudo_labels: PseudoLabels, identifiers: list[str]):
        self.images = images
        self.pseudo_labels = pseudo_labels
        self.identifiers = list(identifiers)

    def load_case(self, identifier: str) -> tuple[Any, Any, None, dict[str, Any]]:
        """Image ``(C, *S)``, labels ``(1, *S)``, nothing of an earlier stage, and the locations of classes."""
        labels = self.pseudo_labels.labels(identifier)
        properties = {"class_locations": self.pseudo_labels.class_locations(labels)}
        return self.images.load_case(identifier)[0], labels, None, properties


class PseudoLabeledLoader(RowsLoader):
    """nnU-Net's loader, foreground oversampling included, for cases whose every voxel has a label."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        # with an ignore label nnU-Net centers patches on annotated voxels; predictions ignore none
        self.has_ignore = False


def _classes(labels: np.ndarray) -> list[int]:
    return [value for value in np.unique(labels).tolist() if value > 0]
