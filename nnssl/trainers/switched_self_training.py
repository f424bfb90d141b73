"""Self-training on patches in which labeled and pseudo-labeled cases exchange regions."""

from __future__ import annotations

import torch

from nnssl.dataloading.mixed_pairs import PairedCases
from nnssl.dataloading.pseudo_labeled import PseudoLabeledCases
from nnssl.trainers.engine.requirements import check_value
from nnssl.trainers.engine.step import Step
from nnssl.trainers.registry import register
from nnssl.trainers.self_training import SelfTraining


@register
class SwitchedSelfTraining(SelfTraining):
    """Regional switch of labeled cases, then of labeled with pseudo-labeled ones.

    Round 0 is `Supervised` with the regional switch: two labeled cases exchange the content of random boxes at
    corresponding positions (Zhou et al., EFS-MedSeg, Medical Image Analysis 104, 2025). Its network predicts all
    unlabeled cases as a whole, as in `SelfTraining` (Huang et al., MICCAI FLARE 2022), and a new one is trained on
    pairs of a labeled and a pseudo-labeled case that exchange boxes in the same way; both patches of a pair are used,
    as in bidirectional copy-paste (Bai et al., BCP, arXiv:2305.00673), but with pseudo-labels that are made once::

        L = L_nnU-Net(patches of labeled and pseudo-labeled cases, switched with ``switch_probability``)

    A step costs what one of `Supervised` does in every round, since no teacher runs in the loop and the batch is the
    labeled one. The steps of the run are those of all rounds together.

    ``mixing=False`` is `SelfTraining` with the switch among labeled cases, in two rounds of 1:2.
    """

    source = "after Zhou et al., doi:10.1016/j.media.2025.103637; Huang et al., doi:10.1007/978-3-031-23911-3_16"
    year = 2026
    status = "own"
    min_labeled = 2
    min_labeled_patches = 2
    memory_factor = 1.0

    atlas_augmentation = "regional_switch"
    rounds = 2
    round_shares = (1.0, 2.0)
    mixing: bool = True

    def check_settings(self) -> None:
        super().check_settings()
        # patches hold voxels of both kinds
        check_value(self, "pseudo_weight", self.pseudo_weight == 1 or not self.mixing, "1 while mixing")

    @property
    def num_unlabeled(self) -> int:
        """None beside the labeled ones, where the patches of a pair are those."""
        return 0 if self.mixing else super().num_unlabeled

    def unlabeled_cases(self) -> PseudoLabeledCases | None:
        cases = super().unlabeled_cases()
        if cases is None or not self.mixing:
            return cases
        return PairedCases(cases.images, cases.pseudo_labels, cases.identifiers)

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        # mixed pairs come as labeled patches
        return super().unsupervised_loss(step) if len(step.unlabeled) else {}
