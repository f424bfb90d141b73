"""Seconds for Dice, IoU, HD95, ASSD and NSD of one class, beside two other packages (docs/performance.md).

    python benchmarks/metrics_time.py

The same pairs of random blobs for all, in turn, on one thread; medians of CPU seconds. MONAI computes each distance on
its own, as its functions do; surface-distance has no IoU.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import monai.metrics
import numpy as np
import surface_distance
import torch
from scipy.ndimage import gaussian_filter

from nnssl.evaluation.metrics import compare_masks

SPACING = (1.0, 1.0, 1.0)


def blobs(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A mask of about a fifth of the volume, and one much like it."""
    noise = np.random.default_rng(seed).normal(size=(2, size, size, size)).astype(np.float32)
    first, second = (gaussian_filter(part, size / 16) for part in noise)
    other = first + 0.2 * second
    return first > np.quantile(first, 0.8), other > np.quantile(other, 0.8)


def with_nnssl(reference: np.ndarray, prediction: np.ndarray) -> None:
    compare_masks(reference, prediction, SPACING, tolerances_mm=(1.0,))


def with_surface_distance(reference: np.ndarray, prediction: np.ndarray) -> None:
    surface_distance.compute_dice_coefficient(reference, prediction)
    distances = surface_distance.compute_surface_distances(reference, prediction, SPACING)
    surface_distance.compute_robust_hausdorff(distances, 95)
    surface_distance.compute_average_surface_distance(distances)
    surface_distance.compute_surface_dice_at_tolerance(distances, 1.0)


def with_monai(reference: np.ndarray, prediction: np.ndarray) -> None:
    masks = [torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference)]
    common: dict[str, Any] = {"include_background": True, "spacing": SPACING}
    monai.metrics.compute_dice(*masks, include_background=True)
    monai.metrics.compute_iou(*masks, include_background=True)
    monai.metrics.compute_hausdorff_distance(*masks, percentile=95, **common)
    monai.metrics.compute_average_surface_distance(*masks, symmetric=True, **common)
    monai.metrics.compute_surface_dice(*masks, [1.0], use_subvoxels=True, **common)


PACKAGES: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "nnssl": with_nnssl,
    "surface-distance": with_surface_distance,
    "MONAI": with_monai,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 192], help="edges of the volumes in voxels")
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| volume | {' | '.join(PACKAGES)} |\n|{'---|' * (1 + len(PACKAGES))}", flush=True)
    for size in arguments.sizes:
        seconds: dict[str, list[float]] = {name: [] for name in PACKAGES}
        for seed in range(arguments.pairs):
            pair = blobs(size, seed)
            for name, function in PACKAGES.items():
                began = time.process_time()
                function(*pair)
                seconds[name].append(time.process_time() - began)
        cells = [f"{statistics.median(values):.2f}" for values in seconds.values()]
        print(f"| {size}x{size}x{size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
