"""Cleaning of hard labels by connected components."""

from __future__ import annotations

import numpy as np
import torch
from acvl_utils.morphology.morphology_helper import remove_all_but_largest_component


@torch.library.custom_op("nnssl::largest_components", mutates_args=())
def largest_components(labels: torch.Tensor) -> torch.Tensor:
    """Keeps the largest connected component of each class or region in each patch; the rest becomes background.

    Voxels that touch at a corner are connected. Computed on the host: a caller on another device waits for it.

    Args:
        labels: class numbers ``(N, 1, *S)``, or regions ``(N, R, *S)`` as booleans.

    Returns:
        The same shape and number format, on the same device.
    """
    host = labels.cpu().numpy()
    cleaned = np.zeros_like(host)
    for channel, result in zip(host.reshape(-1, *host.shape[2:]), cleaned.reshape(-1, *host.shape[2:]), strict=True):
        for value in np.unique(channel[channel != 0]):
            result[remove_all_but_largest_component(channel == value)] = value
    return torch.from_numpy(cleaned).to(labels.device)


@largest_components.register_fake
def _(labels: torch.Tensor) -> torch.Tensor:
    # for tensors that have a shape and no values
    return torch.empty_like(labels)
