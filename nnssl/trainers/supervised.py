"""The baseline that every method must beat."""

from __future__ import annotations

from nnssl.trainers.base import SemiSupervisedTrainer
from nnssl.trainers.registry import register


@register
class Supervised(SemiSupervisedTrainer):
    """nnU-Net on the labeled cases alone (Isensee et al., Nature Methods 18, 2021, doi:10.1038/s41592-020-01008-z).

    Loss, augmentation, optimizer and schedule are nnU-Net's; the engine adds precision, streams and checkpoints.
    """

    source = "Isensee et al., Nature Methods 2021, doi:10.1038/s41592-020-01008-z"
    year = 2021
    status = "official code"
    uses_unlabeled = False
    min_unlabeled = 0
    supports_cascade = True
