"""Uniform patches from images without labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from threadpoolctl import threadpool_limits

from nnssl.dataloading.cases import UnlabeledCases
from nnssl.dataloading.rows import RowsLoader


class UnlabeledLoader(RowsLoader):
    """nnU-Net's patch geometry (padding, 2D slices of 3D cases) without any segmentation.

    Patches are placed uniformly. Every batch is a tensor ``(B_u, C, *patch)``, float32.

    Args:
        cases: preprocessed unlabeled cases.
        batch_size: B_u of the whole batch.
        initial_patch_size: patch cut from the image, large enough for the spatial transforms.
        patch_size: patch after the transforms.
        label_manager: nnU-Net's; only its number of labels is looked at.
        transforms: training transforms, applied to the image (and the nonzero mask where normalization needs it).
        rows: positions of the patches to make; all if None.
    """

    def __init__(
        self,
        cases: UnlabeledCases,
        batch_size: int,
        initial_patch_size: Sequence[int] | np.ndarray,
        patch_size: Sequence[int] | np.ndarray,
        label_manager: LabelManager,
        transforms: BasicTransform,
        rows: range | None = None,
    ):
        super().__init__(
            cases, batch_size, initial_patch_size, patch_size, label_manager, rows=rows, transforms=transforms
        )
        # with an ignore label nnU-Net centers patches on annotated voxels, of which there are none here
        self.has_ignore = False

    def generate_train_batch(self, announce: Callable[[int], None] | None = None) -> dict[str, Any]:
        """``{"data": (rows, C, *patch), "keys": case names}``; ``announce`` as in `RowsLoader`."""
        keys = self.get_indices()
        patches = []
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            for position, key in zip(self.rows, keys, strict=True):
                if announce is not None:
                    announce(position)
                patches.append(self._patch(key))
        return {"data": torch.stack(patches), "keys": keys}

    def _patch(self, key: str) -> torch.Tensor:
        image, mask = self._data.load_case(key)
        lower, upper = self.get_bbox(image.shape[1:], False, None)
        box = [[low, high] for low, high in zip(lower, upper, strict=True)]
        arrays = {"image": torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()}
        if mask is not None:
            # nnU-Net's convention for the nonzero mask inside a segmentation: -1 outside, 0 inside
            inside = torch.from_numpy(crop_and_pad_nd(mask, box, 0))
            arrays["segmentation"] = inside.to(torch.int16) - 1
        if self.patch_size_was_2d:
            arrays = {name: array[:, 0] for name, array in arrays.items()}
        return self.transforms(**arrays)["image"]
