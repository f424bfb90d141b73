r"""How sure a model is of its masks: maps for every voxel, and an estimate of the quality for every case.

Members are the networks whose disagreement tells most at no cost of training: several folds; the members of an
ensemble; or the network that predicts and those that its checkpoint keeps beside it with the same architecture
(teacher, second network). Their probabilities :math:`p_m` are brought to the grid of the scan, then for every voxel

- entropy of the mean, :math:`H(\bar p)`,
- disagreement, :math:`H(\bar p) - \frac{1}{M} \sum_m H(p_m)` (mutual information; Gal et al., ICML 2017),

both divided by the entropy of a voxel of which nothing is known, so that they lie between 0 and 1. Of overlapping
regions the values are means over the regions.

The estimates of a case need no reference:

- estimated_dice: Dice between the mask and the mean probabilities, :math:`2 \sum_{mask} p / (|mask| + \sum p)`, mean
  over the classes in the mask (soft Dice confidence; Borges et al., 2024). None for an empty mask.
- mean_entropy: mean of the entropy over the mask's foreground. None for an empty mask.
- agreement: Dice between the masks of two members, mean over pairs and classes (Roy et al., NeuroImage 195:11-22,
  2019). None for a single member.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from nnssl.inference.quality import estimates_file, map_file
from nnssl.losses.uncertainty import class_entropy, region_entropy
from nnssl.utils.files import atomic_path, write_json

# modules that wrap a network, such as an average of past students, keep it under this name
_WRAPPED = "network."

Array = NDArray[Any]


def further_networks(checkpoint: Mapping[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Weights of the networks that a checkpoint keeps beside the one that predicts, with its names and shapes.

    A network with the very weights of the predicting one is left out. Empty for checkpoints without modules.
    """
    own = checkpoint["network_weights"]
    side = checkpoint.get("semi_supervised") or {}
    candidates = [side.get("student"), *(side.get("modules") or {}).values()]
    found = []
    for weights in filter(None, candidates):
        if set(weights) != set(own):
            weights = {
                name.removeprefix(_WRAPPED): value for name, value in weights.items() if name.startswith(_WRAPPED)
            }
        same_shape = set(weights) == set(own) and all(weights[name].shape == own[name].shape for name in own)
        if same_shape and not all(torch.equal(weights[name], own[name]) for name in own):
            found.append({name: value.clone() for name, value in weights.items()})
    return found


def uncertainty_maps(members: Sequence[Array], regions: bool = False) -> dict[str, Array]:
    """Maps (X, Y, Z) of the probabilities (K, X, Y, Z) of each member: ``entropy``, with several ``disagreement`` too.

    >>> sure, opposite = np.array([[[1.0]], [[0.0]]]), np.array([[[0.0]], [[1.0]]])
    >>> maps = uncertainty_maps([sure, opposite])
    >>> maps["entropy"].item(), maps["disagreement"].item()
    (1.0, 1.0)
    """
    mean = np.mean(members, axis=0)
    total = _entropy(mean, regions)
    maps = {"entropy": total}
    if len(members) > 1:
        expected = np.mean([_entropy(probabilities, regions) for probabilities in members], axis=0)
        # rounding makes it less than 0 where members agree
        maps["disagreement"] = np.maximum(total - expected, 0)
    return maps


def estimate_quality(
    members: Sequence[Array], mask: Array, classes: Mapping[int, Sequence[int]], regions: bool = False
) -> dict[str, float | int | None]:
    """Estimates of a case.

    Args:
        members: probabilities (K, X, Y, Z) of each member.
        mask: the mask (X, Y, Z) that was predicted.
        classes: label values by the channel of the probabilities that belongs to them.
        regions: whether channels are overlapping regions.
    """
    mean = np.mean(members, axis=0)
    foreground = np.isin(mask, list(itertools.chain.from_iterable(classes.values())))
    entropy = _entropy(mean, regions)[foreground]
    agreement = [
        dice
        for first, second in itertools.combinations([_hard(m, regions) for m in members], 2)
        for channel in classes
        if (dice := _dice(first[channel], second[channel])) is not None
    ]
    return {
        "members": len(members),
        "estimated_dice": estimated_dice(mean, mask, classes),
        "mean_entropy": float(entropy.mean()) if entropy.size else None,
        "agreement": float(np.mean(agreement)) if agreement else None,
    }


def estimated_dice(probabilities: Array, mask: Array, classes: Mapping[int, Sequence[int]]) -> float | None:
    """Dice between a mask (X, Y, Z) and its probabilities (K, X, Y, Z), mean over the classes in it; None without any.

    ``classes`` are the label values by the channel of the probabilities that belongs to them.
    """
    soft = []
    for channel, values in classes.items():
        inside, probability = np.isin(mask, values), probabilities[channel]
        if inside.any():
            soft.append(2 * float(probability[inside].sum()) / float(inside.sum() + probability.sum()))
    return float(np.mean(soft)) if soft else None


def values_by_channel(labels: LabelManager) -> dict[int, list[int]]:
    """Label values by the channel of the probabilities that belongs to them; of regions those that they are made of."""
    if labels.has_regions:
        return {i: np.atleast_1d(region).tolist() for i, region in enumerate(labels.foreground_regions)}
    return {label: [label] for label in labels.foreground_labels}


def export_uncertainty(
    logits: Array,
    members: Sequence[Array],
    properties: dict,
    configuration_manager: Any,
    plans_manager: Any,
    dataset_json: dict,
    output: Path,
    name: str,
) -> None:
    """Writes ``uncertainty/<name>_entropy.nii.gz``, ``_disagreement`` and the estimates of one case.

    The mask of the case must have been written to ``output``: it gives the grid.

    Raises:
        ValueError: if the reader of the data set turns images, so that the maps would not lie on the mask.
    """
    import SimpleITK
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

    labels = plans_manager.get_label_manager(dataset_json)
    arguments = (plans_manager, configuration_manager, labels, properties)
    image = SimpleITK.ReadImage(str(output / (name + dataset_json["file_ending"])))
    written = SimpleITK.GetArrayFromImage(image)
    mask = convert_predicted_logits_to_segmentation_with_correct_shape(logits, *arguments)
    if not np.array_equal(_on_grid(mask, written), written):
        raise ValueError(f"uncertainty cannot be written for images read by {plans_manager.image_reader_writer_class}")
    probabilities = [
        convert_predicted_logits_to_segmentation_with_correct_shape(member, *arguments, return_probabilities=True)[1]
        for member in members
    ]
    for kind, values in uncertainty_maps(probabilities, labels.has_regions).items():
        volume = SimpleITK.GetImageFromArray(_on_grid(values, written).astype(np.float32))
        volume.CopyInformation(image)
        with atomic_path(map_file(output, name, kind)) as temporary:
            SimpleITK.WriteImage(volume, str(temporary))
    quality = estimate_quality(probabilities, mask, values_by_channel(labels), labels.has_regions)
    # last: with it the case counts as done
    write_json({"case": name, **quality}, estimates_file(output, name))


def _entropy(probabilities: Array, regions: bool) -> Array:
    values = torch.from_numpy(np.ascontiguousarray(probabilities, dtype=np.float32))[None]
    if regions:
        return (region_entropy(values).mean(1) / np.log(2))[0].numpy()
    return (class_entropy(values) / np.log(len(probabilities)))[0, 0].numpy()


def _hard(probabilities: Array, regions: bool) -> Array:
    """(K, X, Y, Z): whether the voxel belongs to the channel."""
    if regions:
        return probabilities > 0.5
    return probabilities.argmax(0) == np.arange(len(probabilities)).reshape(-1, *[1] * (probabilities.ndim - 1))


def _dice(first: Array, second: Array) -> float | None:
    size = int(first.sum()) + int(second.sum())
    return 2 * int((first & second).sum()) / size if size else None


def _on_grid(values: Array, written: Array) -> Array:
    """Arrays of nnU-Net have an axis of length 1 for images of two dimensions, their files have none."""
    return values[0] if values.ndim == 3 and written.ndim == 2 and len(values) == 1 else values
