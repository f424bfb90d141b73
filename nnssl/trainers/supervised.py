"""The baseline that every method must beat."""

from __future__ import annotations

from typing import ClassVar

from nnssl.trainers.base import SemiSupervisedTrainer, Status
from nnssl.trainers.registry import register


@register
class Supervised(SemiSupervisedTrainer):
    """nnU-Net on the labeled cases alone (Isensee et al., Nature Methods 18, 2021, doi:10.1038/s41592-020-01008-z).

    Augmentation is nnU-Net's, but that the plan says which axes are mirrored, and that patches are centered on classes
    that would be too rare in them (``least_class_share``). Loss, optimizer and schedule are nnU-Net's in trainings of
    10,000 steps and more and with ``recipe=nnunet``; shorter ones have a recipe of their own (docs/few_labels.md).
    """

    source = "Isensee et al., Nature Methods 2021, doi:10.1038/s41592-020-01008-z"
    year = 2021
    status: ClassVar[Status] = "official code"
    uses_unlabeled = False
    min_unlabeled = 0
    supports_cascade = True
