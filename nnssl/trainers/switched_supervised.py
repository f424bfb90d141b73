"""The regional switch alone: the control of every method that mixes patches."""

from __future__ import annotations

from nnssl.trainers.registry import register
from nnssl.trainers.supervised import Supervised


@register
class SwitchedSupervised(Supervised):
    """`Supervised` with the regional switch of Zhou et al. (EFS-MedSeg, Medical Image Analysis 104, 2025).

    Pairs of labeled cases exchange boxes at corresponding positions, image and label together (docs/augmentation.md).
    No unlabeled case is used: what a method that mixes labeled with unlabeled patches gains over this one, it gains by
    the unlabeled cases. The same as ``Supervised --atlas-augmentation regional_switch``, in a folder of its own.
    """

    source = "after Zhou et al., doi:10.1016/j.media.2025.103637"
    year = 2026
    status = "own"
    min_labeled = 2
    min_labeled_patches = 2

    atlas_augmentation = "regional_switch"
