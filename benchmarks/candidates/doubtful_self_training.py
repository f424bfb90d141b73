"""`SwitchedSelfTraining` whose pseudo-labels say how sure they are: a candidate, not a method of nnssl.

A trainer of another package, made known by an entry point: with this folder on ``PYTHONPATH`` nnssl's commands find it
(see `doubt.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from nnssl.errors import UserError
from nnssl.inference.uncertainty import estimated_dice, values_by_channel
from nnssl.trainers.engine import checkpoint
from nnssl.trainers.engine.loop import FINAL
from nnssl.trainers.engine.pipelines import unlabeled_images
from nnssl.trainers.engine.shared_loss import dice_and_cross_entropy
from nnssl.trainers.engine.validation import predict_logits, predictor_of
from nnssl.trainers.registry import register
from nnssl.trainers.switched_self_training import SwitchedSelfTraining

BOUNDS = torch.tensor([0.6, 0.8, 0.95])
"""Highest probabilities between the levels."""
LEVELS = torch.tensor([0.5, 0.7, 0.875, 1.0])
"""What the highest probability of a voxel is taken for, by level."""
USES = ("hard", "weights", "soft")


def encode(probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities ``(K, *S)`` to one number per voxel, that of the class itself on the highest level; ``(*S)``.

    K + 3 * (K * first + second) + level on the others, of the most and second most likely class.
    """
    classes = len(probabilities)
    (highest, _), (first, second) = (part.unbind(0) for part in probabilities.topk(2, dim=0))
    level = torch.bucketize(highest, BOUNDS.to(highest.dtype))
    return torch.where(level == len(BOUNDS), first, classes + len(BOUNDS) * (classes * first + second) + level)


def tables(classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What each number of `encode` stands for: most likely class, weight (0 to 1), probabilities ``(numbers, K)``."""
    certain = torch.eye(classes)
    doubtful = []
    for first in range(classes):
        for second in range(classes):
            for level in LEVELS[:-1]:
                doubtful.append(level * certain[first] + (1 - level) * certain[second])
    pairs = torch.arange(classes).repeat_interleave(classes * len(BOUNDS))
    weights = (2 * LEVELS[:-1] - 1).repeat(classes * classes)
    return (
        torch.cat([torch.arange(classes), pairs]),
        torch.cat([torch.ones(classes), weights]),
        torch.cat([certain, torch.stack(doubtful)]),
    )


@register
class DoubtfulSelfTraining(SwitchedSelfTraining):
    """``use`` says what becomes of the probabilities: ``hard`` labels of all voxels, hard labels with ``weights``
    2 p - 1, or ``soft`` labels. For classes, not for regions; positions must not correspond by the foreground box."""

    use: str = "hard"

    def check_settings(self) -> None:
        super().check_settings()
        if self.use not in USES:
            raise UserError("DoubtfulSelfTraining: no such use", found=self.use, expected=", ".join(USES))

    def on_train_start(self) -> None:
        super().on_train_start()
        found = tables(self.label_manager.num_segmentation_heads)
        self.labels_of, self.weights_of, self.probabilities_of = (part.to(self.device) for part in found)

    def segmentation_loss(self, heads: list[torch.Tensor], target: list[torch.Tensor]) -> torch.Tensor:
        if not self.current_round:
            return super().segmentation_loss(heads, target)
        numbers = [part.long() for part in target]
        if self.use == "soft":
            return self.over_heads(self._soft_loss, heads, numbers)
        labels = [self.labels_of[part] for part in numbers]
        if self.use == "hard":
            return super().segmentation_loss(heads, labels)
        return self.masked_segmentation_loss(heads, labels, [self.weights_of[part] for part in numbers])

    def _soft_loss(self, logits: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        of_dice, of_ce = self.segmentation_weights
        soft = self.probabilities_of[numbers[:, 0]].movedim(-1, 1)
        of_classes = getattr(dice_and_cross_entropy(self.loss).ce, "weight", None)
        return of_ce * cross_entropy(logits, soft, of_classes) + of_dice * self.dice_loss(logits, soft)

    def _start_round(self, stopping: Callable[[], bool]) -> bool:
        ended = self.current_round - 1
        checkpoint.save(self, self.round_folder(ended) / FINAL, resumable=False)
        if not self._predict(ended, stopping):
            return False
        self._select(ended)
        return True

    def _predict(self, ended: int, stopping: Callable[[], bool]) -> bool:
        target, images = self.pseudo_labels(ended), unlabeled_images(self)
        predictor = predictor_of(self, self.mirrors_between_phases)
        for case in tqdm([case for case in self.split().unlabeled if case not in target], "pseudo-labels", leave=False):
            if stopping():
                return False
            image, mask = images.load_case(case)
            probabilities = self.label_manager.apply_inference_nonlin(
                predict_logits(predictor, torch.from_numpy(image[:]))
            ).float()
            quality = estimated_dice(
                probabilities.numpy(), probabilities.argmax(0).numpy(), values_by_channel(self.label_manager)
            )
            labels = encode(probabilities).numpy()[None].astype("int16")
            if mask is not None:
                labels[(labels == 0) & (mask[:] == 0)] = -1
            facts = {"foreground": int((labels > 0).sum()), "estimated_dice": quality}
            target.write(case, labels, self.label_manager, self.configuration_manager.patch_size, facts)
        return True
