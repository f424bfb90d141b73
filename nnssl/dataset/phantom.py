"""Anatomical phantom data sets in nnU-Net's raw format, made on the spot: for the demo and for tests.

Each case is a body with two paired organs, a cavity nested in the larger one, a small nodule, and unlabeled blobs that
look like the structures but are not. Pose, size and shape differ between cases (smooth random deformation), as do
contrast, bias field, texture and noise.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from nnssl.errors import UserError
from nnssl.utils.files import write_json

PHANTOM_LABELS = {"background": 0, "large_organ": 1, "small_organ": 2, "cavity": 3, "nodule": 4}
FILE_ENDINGS = {2: (".nii.gz", ".nii", ".nrrd", ".mha", ".png"), 3: (".nii.gz", ".nii", ".nrrd", ".mha")}

_DEFAULT_SHAPE = {2: (88, 80), 3: (32, 40, 40)}
_DEFAULT_SPACING = {2: (0.5, 0.5), 3: (1.5, 1.0, 1.0)}
_Layer = tuple[NDArray[np.float64], float, int | None]  # share of each voxel, intensity, label
_AIR, _TISSUE, _DISTRACTOR = 0.05, 0.36, 0.66


@dataclass(frozen=True)
class _Structure:
    """Ellipsoid in body coordinates: 0 is the center, 1 half the extent of the image; axes z, y, x (2D: y, x).

    A structure ``inside`` another one moves and grows with it.
    """

    label: int
    center: tuple[float, float, float]
    radius: tuple[float, float, float]
    intensity: float
    inside: int | None = None


# Later structures lie on top of earlier ones, so that the cavity is cut out of its organ.
_STRUCTURES = (
    _Structure(1, (0.05, 0.10, -0.38), (0.66, 0.55, 0.38), 0.64),
    _Structure(2, (0.00, 0.12, 0.44), (0.50, 0.42, 0.28), 0.57),
    _Structure(3, (0.08, 0.08, -0.36), (0.46, 0.37, 0.25), 1.25, inside=1),
    _Structure(4, (0.00, -0.45, 0.10), (0.29, 0.25, 0.25), 0.88),
)


def make_phantom_dataset(
    folder: str | os.PathLike[str],
    *,
    labeled: int = 3,
    unlabeled: int = 24,
    test: int = 6,
    shape: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
    channels: int = 1,
    seed: int = 0,
    dimensions: int = 3,
    file_ending: str = ".nii.gz",
) -> Path:
    """Writes a phantom data set with imagesTr, labelsTr, imagesUn, imagesTs, labelsTs and dataset.json.

    Args:
        folder: the data set's folder, ``.../DatasetXXX_Name``; must not exist. It is written under a temporary name
            and renamed, so that it is either whole or not there.
        labeled, unlabeled, test: numbers of cases of each kind. Labels of unlabeled cases are never written.
        shape: voxels along z, y, x (2D: y, x), at least 16 each; default (32, 40, 40) or (88, 80).
        spacing: mm along z, y, x (2D: y, x); default (1.5, 1, 1) or (0.5, 0.5). PNG files hold none.
        channels: number of image channels, each with a contrast of its own.
        seed: two calls with the same arguments write the same voxels. Case i depends on the seed and i only.
        dimensions: 3, or 2 for single slices.
        file_ending: .nii.gz, .nii, .nrrd, .mha, or .png for 2D.

    Returns:
        The folder.

    Raises:
        UserError: if the folder exists or an argument is out of range.
    """
    folder = Path(folder)
    size, voxel = _checked_grid(dimensions, shape, spacing)
    if file_ending not in FILE_ENDINGS[dimensions]:
        raise UserError(
            f"a {dimensions}D phantom cannot be written as {file_ending!r}",
            expected="one of " + ", ".join(FILE_ENDINGS[dimensions]),
        )
    if min(labeled, unlabeled, test) < 0 or labeled + unlabeled + test < 1 or channels < 1:
        raise UserError(
            "a phantom data set needs at least one case and one channel",
            found=f"{labeled} labeled, {unlabeled} unlabeled, {test} test cases, {channels} channels",
        )
    if folder.exists():
        raise UserError("the folder of the phantom data set exists already", where=folder, fix="name a new folder")

    temporary = folder.with_name(f".tmp_{folder.name}_{os.getpid()}")
    parts = [("imagesTr", "labelsTr", labeled), ("imagesUn", None, unlabeled), ("imagesTs", "labelsTs", test)]
    try:
        index = 0
        for images, labels, count in parts:
            for name in filter(None, (images, labels)):
                (temporary / name).mkdir(parents=True)
            for _ in range(count):
                image, label = make_phantom_case(seed=seed, index=index, shape=size, spacing=voxel, channels=channels)
                case = f"phantom_{index:03d}"
                for channel, values in enumerate(image):
                    _write(values, voxel, temporary / images / f"{case}_{channel:04d}{file_ending}")
                if labels is not None:
                    _write(label, voxel, temporary / labels / f"{case}{file_ending}")
                index += 1
        write_json(
            {
                "name": folder.name.partition("_")[2] or folder.name,
                "description": "Anatomical phantom, made by nnssl",
                "channel_names": {str(channel): f"phantom{channel}" for channel in range(channels)},
                "labels": PHANTOM_LABELS,
                "numTraining": labeled,
                "file_ending": file_ending,
            },
            temporary / "dataset.json",
        )
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def make_phantom_case(
    *,
    seed: int,
    index: int,
    shape: Sequence[int] = _DEFAULT_SHAPE[3],
    spacing: Sequence[float] = _DEFAULT_SPACING[3],
    channels: int = 1,
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One case: image (channels, *shape), values 0 to about 1000, and label (*shape) with `PHANTOM_LABELS`.

    Shape and spacing have two or three entries. The scale of the values differs between cases, as in MRI.
    """
    size, voxel = _checked_grid(len(shape), shape, spacing)
    random = np.random.default_rng([seed, index])
    position = _deformed_coordinates(size, voxel, random)
    fade = 1.2 / min(size)  # in body coordinates: structures fade over about one voxel (partial volume)

    body = _occupancy(position, np.zeros(len(size)), np.array([0.92, 0.86, 0.90])[-len(size) :], fade)
    layers: list[_Layer] = [(body, _TISSUE, None)]
    for center, radius in _distractors(len(size), random):
        layers.append((_occupancy(position, center, radius, fade), _DISTRACTOR, None))
    moves: dict[int, tuple[NDArray[np.float64], float]] = {}
    for structure in _STRUCTURES:
        shift, growth = moves.get(structure.inside or 0, (random.uniform(-0.05, 0.05, 3), random.uniform(0.82, 1.2)))
        moves[structure.label] = shift, growth
        center = np.array(structure.center) + shift
        radius = np.array(structure.radius) * growth * random.uniform(0.9, 1.1, 3)
        soft = _occupancy(position, center[-len(size) :], radius[-len(size) :], fade)
        layers.append((soft, structure.intensity, structure.label))

    label = np.zeros(size, np.uint8)
    for soft, _, value in layers:
        if value is not None:
            label[soft > 0.5] = value
    image = np.stack([_channel_image(layers, size, voxel, channel, random) for channel in range(channels)])
    return image.astype(np.float32), label


def _checked_grid(
    dimensions: int, shape: Sequence[int] | None, spacing: Sequence[float] | None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if dimensions not in _DEFAULT_SHAPE:
        raise UserError("a phantom has 2 or 3 dimensions", found=dimensions)
    size = tuple(int(n) for n in (_DEFAULT_SHAPE[dimensions] if shape is None else shape))
    voxel = tuple(float(s) for s in (_DEFAULT_SPACING[dimensions] if spacing is None else spacing))
    if len(size) != dimensions or min(size) < 16:
        raise UserError("shape of the phantom", expected=f"{dimensions} numbers, 16 voxels or more each", found=size)
    if len(voxel) != dimensions or min(voxel) <= 0:
        raise UserError("spacing of the phantom", expected=f"{dimensions} positive numbers in mm", found=voxel)
    return size, voxel


def _smooth_field(size: tuple[int, ...], nodes: int, random: np.random.Generator) -> NDArray[np.float64]:
    """Smooth random field (*size) with standard deviation near 1, from ``nodes`` random values along each axis."""
    field = random.standard_normal((nodes,) * len(size))
    for n in size:
        # a Gaussian around each node, axis by axis: much quicker than spline interpolation of the whole grid
        distance = np.linspace(0, nodes - 1, n)[:, None] - np.arange(nodes)
        weights = np.exp(-(distance**2) / (2 * 0.6**2))
        weights /= np.sqrt((weights**2).sum(1, keepdims=True))
        field = np.tensordot(field, weights, axes=(0, 1))
    return field


def _deformed_coordinates(
    size: tuple[int, ...], voxel: tuple[float, ...], random: np.random.Generator
) -> NDArray[np.float64]:
    """Body coordinates (dimensions, *size) of each voxel: pose and scale of the case plus a smooth displacement."""
    dimensions = len(size)
    extent = np.array(size) * np.array(voxel) / 2
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(size, voxel, strict=True)]
    millimeters = np.stack(np.meshgrid(*axes, indexing="ij"))

    rotation = np.eye(dimensions)
    for first, second in ((0, 1), (0, 2), (1, 2))[: 3 if dimensions == 3 else 1]:
        angle = random.uniform(-0.2, 0.2)
        plane = np.eye(dimensions)
        plane[[first, first, second, second], [first, second, first, second]] = (
            np.cos(angle),
            -np.sin(angle),
            np.sin(angle),
            np.cos(angle),
        )
        rotation = rotation @ plane
    scale = random.uniform(0.88, 1.05) * random.uniform(0.95, 1.05, dimensions)
    shift = random.uniform(-0.06, 0.06, dimensions)

    column = (dimensions,) + (1,) * dimensions
    turned = np.tensordot(rotation, millimeters, axes=1) / (extent * scale).reshape(column) - shift.reshape(column)
    return turned + 0.07 * np.stack([_smooth_field(size, 5, random) for _ in range(dimensions)])


def _occupancy(
    position: NDArray[np.float64], center: NDArray[np.float64], radius: NDArray[np.float64], softness: float
) -> NDArray[np.float64]:
    """Share (*size) of each voxel inside the ellipsoid: 0.5 on its surface, fading over ``softness``."""
    column = (len(position),) + (1,) * len(position)
    distance = np.sqrt((((position - center.reshape(column)) / radius.reshape(column)) ** 2).sum(0)) - 1
    return 1 / (1 + np.exp(np.clip(distance * float(radius.mean()) / (softness / 2), -30, 30)))


def _distractors(dimensions: int, random: np.random.Generator) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Center and radius of a few blobs around the midline, behind and in front, with the intensity of organs."""
    found = []
    for _ in range(4):
        center = np.array([random.uniform(-0.6, 0.6), random.choice([-1, 1]) * random.uniform(0.3, 0.7), 0.0])
        center[2] = random.uniform(-0.45, 0.45)
        found.append((center[-dimensions:], random.uniform(0.08, 0.2, dimensions)))
    return found


def _channel_image(
    layers: list[_Layer],
    size: tuple[int, ...],
    voxel: tuple[float, ...],
    channel: int,
    random: np.random.Generator,
) -> NDArray[np.float64]:
    """Image (*size) of one channel: tissue contrast, texture, bias field, blur, noise and an arbitrary scale."""
    image = np.full(size, _AIR)
    for soft, intensity, _ in layers:
        # an even channel shows the structures bright, an odd one dark, each with less contrast than the one before
        contrast = (intensity - _TISSUE) * (-0.8 if channel % 2 else 1.0) / (1 + 0.25 * (channel // 2))
        image += soft * (_TISSUE + contrast + random.normal(0, 0.04) - image)
    image += 0.035 * _smooth_field(size, 12, random) * layers[0][0]
    image *= np.exp(0.14 * _smooth_field(size, 3, random))
    image = gaussian_filter(image, [0.5 * min(voxel) / s for s in voxel])
    image += random.normal(0, random.uniform(0.03, 0.06), size)
    return np.clip(image, 0, None) ** random.uniform(0.85, 1.2) * random.uniform(300, 900)


def _write(values: NDArray[Any], voxel: tuple[float, ...], path: Path) -> None:
    import SimpleITK

    if path.name.endswith(".png"):
        values = np.clip(values if values.dtype == np.uint8 else values / 5, 0, 255).astype(np.uint8)
    elif values.dtype != np.uint8:
        values = np.round(values).astype(np.int16)
    image = SimpleITK.GetImageFromArray(values)
    image.SetSpacing(voxel[::-1])
    SimpleITK.WriteImage(image, str(path), useCompression=True)
