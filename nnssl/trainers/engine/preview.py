"""Pictures of what the networks make of patches, written while they are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import nn

from nnssl.networks.ema import EMATeacher
from nnssl.networks.unwrap import evaluating, unwrap
from nnssl.pictures.overlay import fullest_slice
from nnssl.pictures.patches import Patch, save_patches, thickest_axis

if TYPE_CHECKING:
    from nnssl.trainers.base import SemiSupervisedTrainer

PICTURES = 20
LEAST_SECONDS = 60.0
FOLDER = "previews"


@dataclass
class _Prediction:
    """Label maps ``(N, *P)`` and confidences ``(N, *P)`` of one network for the patches of a step."""

    labels: torch.Tensor
    confidence: torch.Tensor


def preview_is_due(trainer: SemiSupervisedTrainer, epoch: int, seconds: float) -> bool:
    """Whether the ``epoch``-th one, counted from 1, ends with a preview, the last one being ``seconds`` old.

    That is every N-th epoch, and the last. Unless N was asked for, there are about 20, at least a minute apart.
    """
    every = trainer.settings.preview_every
    if every == 0:
        return False
    if every is None:
        every = max(1, trainer.num_epochs // PICTURES) if seconds > LEAST_SECONDS else trainer.num_epochs
    return epoch % every == 0 or epoch == trainer.num_epochs


@torch.no_grad()
def save_preview_of_epoch(trainer: SemiSupervisedTrainer, batch: dict[str, Any], epoch: int) -> Path:
    """Writes ``previews/epoch_<N>.png`` in the run folder: a labeled and an unlabeled patch of a batch.

    Beside the patch (with the reference, or with the pseudo-labels if the stream delivers some) stand the prediction
    and the confidence (0: all classes equally likely, 1: certain) of the student and of every other segmentation
    network of the method. The patch with most foreground is taken of each kind. Nothing of the training is changed.

    Args:
        trainer: in a training.
        batch: of its stream.
        epoch: counted from 1.
    """
    step = trainer.make_step(batch)
    predictions = {name: _predict(trainer, network, step.images) for name, network in segmentation_networks(trainer)}
    annotations: list[tuple[str, range, torch.Tensor | None]] = [("labeled", range(len(step.labeled)), step.target[0])]
    if len(step.unlabeled):
        rows = range(len(step.labeled), len(step.images))
        annotations.append(("unlabeled", rows, step.pseudo_target[0] if step.pseudo_target else None))
    patches: list[Patch] = []
    for kind, rows, target in annotations:
        known = None if target is None else label_map(trainer, target)
        patches += _row(trainer, kind, step.images[rows.start : rows.stop], known, _part(predictions, rows))
    spacing = trainer.configuration_manager.spacing
    path = Path(trainer.output_folder, FOLDER, f"epoch_{epoch:04d}.png")
    path.parent.mkdir(exist_ok=True)
    shown = [spacing[axis] for axis in range(len(spacing)) if len(spacing) == 2 or axis != thickest_axis(spacing)]
    title = f"{type(trainer).__name__}, epoch {epoch}"
    return save_patches(path, patches, class_names(trainer), shown, title=title, columns=1 + 2 * len(predictions))


def segmentation_networks(trainer: SemiSupervisedTrainer) -> Iterator[tuple[str, nn.Module]]:
    """The student and the other networks with an encoder and a decoder, by name, without wrappers."""
    yield "student", unwrap(trainer.network)
    for name, module in trainer._modules.items():
        inner = inner_network(module)
        if hasattr(inner, "encoder") and hasattr(inner, "decoder"):
            yield name, inner


def inner_network(module: nn.Module) -> nn.Module:
    """What owns the weights in wrappers and teachers."""
    module = unwrap(module)
    return unwrap(module.network) if isinstance(module, EMATeacher) else module


def label_map(trainer: SemiSupervisedTrainer, target: torch.Tensor) -> torch.Tensor:
    """``(N, *P)``, int16 on the CPU, of a reference, pseudo-label or prediction ``(N, C, *P)``.

    Regions count from 1 in the order of the heads, later ones over earlier ones; an ignore label's channel is left out.
    """
    target = target.detach().cpu()
    if not trainer.label_manager.has_regions:
        return target[:, 0].to(torch.int16)
    labels = torch.zeros((len(target), *target.shape[2:]), dtype=torch.int16)
    for region in range(trainer.label_manager.num_segmentation_heads):
        labels[target[:, region] > 0] = region + 1
    return labels


def class_names(trainer: SemiSupervisedTrainer) -> dict[int, str]:
    """Name of each foreground value of a `label_map`."""
    labels = {name: value for name, value in trainer.dataset_json["labels"].items() if name != "ignore"}
    manager = trainer.label_manager
    if not manager.has_regions:
        return {value: name for name, value in labels.items() if value != 0}
    regions = {tuple(value) if isinstance(value, list) else (value,): name for name, value in labels.items()}
    wanted = [tuple(r) if isinstance(r, (list, tuple)) else (r,) for r in manager.foreground_regions]
    return {number: regions[region] for number, region in enumerate(wanted, 1)}


def _predict(trainer: SemiSupervisedTrainer, network: nn.Module, images: torch.Tensor) -> _Prediction:
    with evaluating(network):
        logits = trainer.heads(network, images)[0]
    confidence = trainer.confidence(logits)[:, 0].cpu()
    return _Prediction(label_map(trainer, trainer.hard_labels(logits)), confidence)


def _part(predictions: dict[str, _Prediction], rows: range) -> dict[str, _Prediction]:
    some = slice(rows.start, rows.stop)
    return {name: _Prediction(seen.labels[some], seen.confidence[some]) for name, seen in predictions.items()}


def _row(
    trainer: SemiSupervisedTrainer,
    kind: str,
    images: torch.Tensor,
    known: torch.Tensor | None,
    predictions: dict[str, _Prediction],
) -> Iterator[Patch]:
    """The patch of most foreground in its fullest slice, then prediction and confidence of each network."""
    guide = predictions["student"].labels if known is None else known
    row = int((guide > 0).flatten(1).sum(1).argmax())
    where: tuple[Any, ...] = ()
    if guide.ndim == 4:
        axis = thickest_axis(trainer.configuration_manager.spacing)
        where = (*[slice(None)] * axis, fullest_slice(guide[row].numpy().clip(0), axis))

    def cut(volumes: torch.Tensor) -> NDArray[Any]:
        return volumes[row][where].float().cpu().numpy()

    image = cut(images[:, 0])
    yield Patch(kind, image, None if known is None else cut(known))
    for name, seen in predictions.items():
        labels = cut(seen.labels)
        yield Patch(name, image, labels)
        yield Patch(f"{name}, confidence", cut(seen.confidence), labels, is_confidence=True)
