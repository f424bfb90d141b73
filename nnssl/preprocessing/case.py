"""One case through nnU-Net's preprocessor, into files that are either whole or not there."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnssl.dataloading.cases import MASK_SUFFIX
from nnssl.errors import UserError
from nnssl.preprocessing.manifest import Manifest
from nnssl.utils.disk import disk_errors_named

Kind = Literal["labeled", "unlabeled"]


@dataclass
class CasePreprocessor:
    """Preprocesses single cases of one configuration; sent once to every worker.

    Args:
        plans: content of the plans file.
        configuration: name of the configuration.
        dataset_json: content of dataset.json.
        manifests: manifest of each kind of case; its folder receives the files.
        scratch: folder for files that are being written, on the same file system as the folders.
        verbose: whether nnU-Net's preprocessor prints.
    """

    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    manifests: dict[Kind, Manifest]
    scratch: Path
    verbose: bool = False

    @cached_property
    def _managers(self) -> tuple[PlansManager, ConfigurationManager]:
        plans = PlansManager(self.plans)
        return plans, plans.get_configuration(self.configuration)

    def __call__(self, case: str, images: list[str], label: str | None, content: dict[str, str]) -> None:
        """Writes the files of a case and records it in the manifest of its kind, labeled if there is a label."""
        scratch = Path(tempfile.mkdtemp(dir=self.scratch))
        with disk_errors_named(scratch):
            if label is None:
                self._unlabeled(str(scratch / case), images)
            else:
                plans, configuration = self._managers
                preprocessor = configuration.preprocessor_class(verbose=self.verbose)
                preprocessor.run_case_save(str(scratch / case), images, label, plans, configuration, self.dataset_json)
        manifest = self.manifests["unlabeled" if label is None else "labeled"]
        manifest.add(case, content, _move_files(scratch, manifest.folder))

    def _unlabeled(self, target: str, images: list[str]) -> None:
        image, mask, properties = preprocess_unlabeled(images, *self._managers, self.dataset_json, verbose=self.verbose)
        patch = tuple(self._managers[1].patch_size)
        image_blocks, image_chunks = comp_blosc2_params(image.shape, patch, image.itemsize)
        mask_blocks, mask_chunks = comp_blosc2_params(mask.shape, patch, mask.itemsize)
        nnUNetDatasetBlosc2.save_case(
            image,
            mask,
            properties,
            target,
            chunks=image_chunks,
            blocks=image_blocks,
            chunks_seg=mask_chunks,
            blocks_seg=mask_blocks,
        )
        os.replace(f"{target}_seg.b2nd", f"{target}{MASK_SUFFIX}.b2nd")


def preprocess_unlabeled(
    images: Sequence[str],
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict[str, Any],
    *,
    verbose: bool = False,
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Image, nonzero mask and properties of a case without label, by nnU-Net's preprocessor.

    The mask is made whether or not the plans use it for normalization: nnU-Net resamples it in any case, it compresses
    to almost nothing, and methods may restrict themselves to the body.

    Args:
        images: image files, one per channel.
        plans: the plans.
        configuration: the configuration.
        dataset_json: content of dataset.json.
        verbose: whether nnU-Net's preprocessor prints.

    Returns:
        image ``(C, *S)``, float32; mask ``(1, *S)``, uint8, 1 inside; nnU-Net's properties of the case.
    """
    data, properties = plans.image_reader_writer_class().read_images(list(images))
    preprocessor = configuration.preprocessor_class(verbose=verbose)
    image, outside, properties = preprocessor.run_case_npy(data, None, properties, plans, configuration, dataset_json)
    # nnU-Net makes a segmentation where there is none: 0 inside the nonzero region, -1 outside
    return image.astype(np.float32, copy=False), (outside >= 0).astype(np.uint8), properties


def preprocess_mask(
    file: str, properties: dict[str, Any], plans: PlansManager, configuration: ConfigurationManager
) -> np.ndarray:
    """A mask of a preprocessed case, brought to the grid of its preprocessed image.

    Args:
        file: the mask, on the grid of the scan.
        properties: nnU-Net's of the preprocessed case.
        plans: the plans.
        configuration: the configuration.

    Returns:
        labels ``(1, *S)``.

    Raises:
        UserError: if the mask lies on another grid than the scan.
    """
    mask, _ = plans.image_reader_writer_class().read_seg(file)
    mask = mask.transpose([0, *(axis + 1 for axis in plans.transpose_forward)])
    expected = tuple(int(n) for n in properties["shape_before_cropping"])
    if mask.shape[1:] != expected:
        raise UserError(
            "a mask has another shape than its scan", where=file, expected=expected, found=tuple(mask.shape[1:])
        )
    inside = tuple(slice(*edges) for edges in properties["bbox_used_for_cropping"])
    mask = mask[(slice(None), *inside)]
    before = [properties["spacing"][axis] for axis in plans.transpose_forward]
    after = list(configuration.spacing)
    if len(after) < len(before):  # of 2D configurations, which leave the slices as they are
        after = [before[0], *after]
    shape = compute_new_shape(mask.shape[1:], before, after)
    return configuration.resampling_fn_seg(mask, shape, before, after)


def _move_files(source: Path, target: Path) -> dict[str, int]:
    """Moves all files of a folder after they have reached the disk; their names and sizes."""
    files = sorted(source.iterdir())
    sizes = {}
    for file in files:
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        sizes[file.name] = file.stat().st_size
    for file in files:
        os.replace(file, target / file.name)
    shutil.rmtree(source, ignore_errors=True)
    return sizes
