"""Signed distance maps of segmentations, normalized for regression."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects


def normalized_signed_distance(mask: np.ndarray, sampling: Sequence[float] | None = None) -> np.ndarray:
    """Distance to the surface of an object, positive outside and negative inside, each side scaled to its extreme.

    ``d_out / max(d_out) - d_in / max(d_in)`` and 0 on the inner boundary, which are the object's voxels with a face
    towards the background (Li et al., MICCAI 2020, equation 1 as released). The farthest background voxel has 1, the
    deepest voxel of the object -1, unless the object is all boundary. The edge of the array is no boundary. Where none
    is seen, because the object is absent or fills the array, all values are 0.

    Args:
        mask: boolean ``(*S)`` of any dimension.
        sampling: distance of neighboring voxels along each axis; 1 if None.

    Returns:
        float32 of the shape of ``mask``.

    >>> normalized_signed_distance(np.array([0, 0, 1, 1, 1, 0], bool)).tolist()
    [1.0, 0.5, 0.0, -1.0, 0.0, 0.5]
    """
    mask = np.asarray(mask, bool)
    if not mask.any() or mask.all():
        return np.zeros(mask.shape, np.float32)
    distance = distance_transform_edt(~mask, sampling=sampling).astype(np.float32)
    distance /= distance.max()
    # what is inside is decided by the object and the voxels next to it, so the costly transform is kept small
    near = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in find_objects(mask.astype(np.uint8))[0])
    inside = mask[near]
    depth = distance_transform_edt(inside, sampling=sampling).astype(np.float32)
    core = binary_erosion(inside, border_value=1)
    distance[near] -= np.where(core, depth / depth.max(), 0)
    return distance


@dataclass(frozen=True)
class SignedDistances:
    """Function from a segmentation to the `normalized_signed_distance` of each of its objects.

    Attributes:
        labels: the objects' labels in a label map ``(1, *S)``; None for regions ``(R, *S)``, each an object.
        sampling: as for `normalized_signed_distance`.
    """

    labels: tuple[int, ...] | None
    sampling: tuple[float, ...] | None = None

    def __call__(self, segmentation: torch.Tensor) -> torch.Tensor:
        """``(objects, *S)``, float16: its 3 digits are more than a network hits, and many maps travel with a batch."""
        array = segmentation.numpy()
        masks = array.astype(bool) if self.labels is None else [array[0] == label for label in self.labels]
        return torch.from_numpy(np.stack([normalized_signed_distance(m, self.sampling) for m in masks])).half()
