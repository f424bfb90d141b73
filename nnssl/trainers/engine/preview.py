"""Pictures of what the networks make of patches, written while they are trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
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


def preview_is_due(trainer: SemiSupervisedTrainer, epoch: int, seconds: float) -> bool:
    """Whether the ``epoch``-th one, counted from 1, ends with a preview, the last one being ``seconds`` old.

    That is every N-th epoch, and the last. Unless N was asked for, there are about 20, at least a minute apart.
    """
    every = trainer.settings.preview_every
    if every == 0:
        return False
    if every is None:
        every = math.ceil(trainer.num_epochs / PICTURES) if seconds > LEAST_SECONDS else trainer.num_epochs
    return epoch % every == 0 or epoch == trainer.num_epochs


@torch.no_grad()
def save_preview_of_epoch(trainer: SemiSupervisedTrainer, batch: dict[str, Any], epoch: int) -> Path:
    """Writes ``previews/epoch_<N>.png`` in the run folder: a labeled and an unlabeled patch of a batch.

    Beside the patch (with the reference, or with the pseudo-labels if the stream delivers some) stand the prediction
    and the confidence (0: all classes equally likely, 1: certain) of the student and of every other segmentation
    network of the method. The patch with most foreground is taken of each kind. Nothing of the training is changed.
    Teachers that wait for their students to be pretrained are shown as they are.

    Args:
        trainer: in a training.
        batch: of its stream.
        epoch: counted from 1.
    """
    step = trainer.make_step(batch)
    known: torch.Tensor | None = label_map(trainer, step.target[0])
    patches = _row(trainer, "labeled", step.labeled, known)
    if len(step.unlabeled):
        known = label_map(trainer, step.pseudo_target[0]) if step.pseudo_target else None
        patches += _row(trainer, "unlabeled", step.unlabeled, known)
    spacing = list(trainer.configuration_manager.spacing)
    if len(trainer.configuration_manager.patch_size) == 3:
        del spacing[thickest_axis(spacing)]
    columns = 1 + 2 * sum(1 for _ in segmentation_networks(trainer))
    path = Path(trainer.output_folder, FOLDER, f"epoch_{epoch:04d}.png")
    title = f"{type(trainer).__name__}, epoch {epoch}"
    return save_patches(path, patches, class_names(trainer), spacing, title=title, columns=columns)


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
    """``(N, *P)``, int16 on the CPU, of a reference, pseudo-label or prediction ``(N, C, *P)``; -1 where it is ignored.

    Regions count from 1 in the order of the heads, later ones over earlier ones; an ignore label's channel is left out.
    """
    target = target.detach().cpu()
    if not trainer.label_manager.has_regions:
        labels = target[:, 0].to(torch.int16)
        return (
            labels
            if trainer.label_manager.ignore_label is None
            else labels.where(labels != trainer.label_manager.ignore_label, -1)
        )
    labels = torch.zeros((len(target), *target.shape[2:]), dtype=torch.int16)
    for region in range(trainer.label_manager.num_segmentation_heads):
        labels[target[:, region] > 0] = region + 1
    return labels


def class_names(trainer: SemiSupervisedTrainer) -> dict[int, str]:
    """Name of each foreground value of a `label_map`."""
    labels = {name: value for name, value in trainer.dataset_json["labels"].items() if name != "ignore"}
    # the value of a class that is no region may stand in a list, too
    regions = {tuple(value) if isinstance(value, list) else (value,): name for name, value in labels.items()}
    manager = trainer.label_manager
    if not manager.has_regions:
        return {values[0]: name for values, name in regions.items() if values[0] != 0}
    wanted = [tuple(r) if isinstance(r, (list, tuple)) else (r,) for r in manager.foreground_regions]
    return {number: regions[region] for number, region in enumerate(wanted, 1)}


def _row(trainer: SemiSupervisedTrainer, kind: str, images: torch.Tensor, known: torch.Tensor | None) -> list[Patch]:
    """The patch of most foreground in its fullest slice, then prediction and confidence of each network."""
    guide = _predict(trainer, unwrap(trainer.network), images)[0] if known is None else known
    row = int((guide > 0).flatten(1).sum(1).argmax())
    where: tuple[Any, ...] = (row,)
    if guide.ndim == 4:
        axis = thickest_axis(trainer.configuration_manager.spacing)
        where += (*[slice(None)] * axis, fullest_slice(guide[row].numpy().clip(0), axis))
    image = images[:, 0][where].float().cpu().numpy()
    patches = [Patch(kind, image, None if known is None else known[where].numpy())]
    where = (0, *where[1:])
    for name, network in segmentation_networks(trainer):
        labels, confidence = _predict(trainer, network, images[row : row + 1])
        predicted = labels[where].numpy()
        patches.append(Patch(name, image, predicted))
        patches.append(Patch(f"{name}, confidence", confidence[where].numpy(), predicted, is_confidence=True))
    return patches


def _predict(
    trainer: SemiSupervisedTrainer, network: nn.Module, images: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Label map and confidence ``(N, *P)`` on the CPU."""
    # code for a batch of this size would be compiled for nothing else
    with evaluating(network), torch.compiler.set_stance("force_eager"):
        logits = trainer.heads(network, images)[0]
    return label_map(trainer, trainer.hard_labels(logits)), trainer.confidence(logits)[:, 0].cpu()
