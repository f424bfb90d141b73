"""TCSM: consistency of segmenting and transforming in either order."""

from __future__ import annotations

import random
from typing import Literal

import torch
from torch import nn

from nnssl.augmentation.symmetries import (
    Symmetry,
    apply_each,
    resized_content,
    resizing_keeps,
    symmetries,
    undo_each,
)
from nnssl.errors import UserError
from nnssl.losses.consistency import squared_difference
from nnssl.trainers.engine.requirements import check_value
from nnssl.trainers.engine.step import Step
from nnssl.trainers.mean_teacher import MeanTeacher
from nnssl.trainers.registry import register


@register
class TCSM(MeanTeacher):
    """Transformation-consistent self-ensembling (Li et al., TNNLS 32(2), 2021, doi:10.1109/TNNLS.2020.2995319).

    A mean teacher (see `MeanTeacher` for noise eps, weight w and averaging) that sees each patch x, labeled and
    unlabeled, under a random transform pi; its output is transformed back before it is compared::

        L = L_nnU-Net(labeled) + w(p) * mean((S(x) - pi^-1 T(pi(x + eps)))^2)

    pi is drawn for every patch anew, uniformly from the flips along the mirrored axes of the run and the rotations by
    90 degrees in planes of two such axes with equal patch edges and spacings (both of them, as half a turn reverses
    both: axes that the plan does not mirror, because look-alike classes are told apart along them, stay as they
    are). These move voxels and compute none. ``scaling=0.1`` adds the paper's change of size by a factor from 0.9 to
    1.1, linearly interpolated; voxels for which it leaves the patch are then not compared.

    Deviations: nnU-Net's Dice + cross entropy with deep supervision instead of weighted cross entropy. Weight, decay
    and noise of `MeanTeacher`: 1.0, 0.999 and a standard deviation of 0.5 belong to the paper's photographs, whose
    intensities are not normalized by theirs. No scaling by default, since it cannot be undone exactly. The released
    code (36112e3) computes the consistency without gradient and undoes one of two scalings; this is the published
    definition. ``consistency_on=unlabeled`` leaves labeled patches out, as other mean teachers do, and belongs to
    ``student_view=strong``, which only unlabeled patches have. The student predicts.
    """

    source = "Li et al., TNNLS 2021, doi:10.1109/TNNLS.2020.2995319"
    year = 2021
    status = "paper"
    memory_factor = 2.7

    consistency_on: Literal["all", "unlabeled"] = "all"
    scaling: float = 0.0
    """Largest relative change of size, 0.1 in the paper; 0 for none."""

    group: list[Symmetry]

    def check_settings(self) -> None:
        super().check_settings()
        check_value(self, "scaling", 0 <= self.scaling < 1, "0 to below 1")

    def build_modules(self) -> dict[str, nn.Module]:
        plan = self.configuration_manager
        # nnU-Net mirrors along all axes
        mirrored = range(len(plan.patch_size)) if self.mirror_axes is None else self.mirror_axes
        self.group = symmetries(plan.patch_size, plan.spacing, mirrored)
        if len(self.group) == 1 and self.scaling == 0:
            raise UserError(
                "TCSM has no transform to be consistent with: no axis is mirrored in this run",
                fix="--set scaling=0.1, or --set mirror_axes=... if some axes may be mirrored, or train MeanTeacher",
            )
        return super().build_modules()

    def unsupervised_loss(self, step: Step) -> dict[str, torch.Tensor]:
        unlabeled = self.teacher_view(step)
        parts = [step.labeled, unlabeled] if self.consistency_on == "all" else [unlabeled]
        images = torch.cat([self.with_noise(part) for part in parts])
        transforms = [symmetry for part in parts for symmetry in self.draw_symmetries(len(part))]
        views = apply_each(transforms, images)
        student = self.probabilities(step.heads[0][-len(images) :])
        if self.scaling == 0:
            target = undo_each(transforms, self.teacher_probabilities(views))
            return {"consistency": self.weight(step) * squared_difference(student, target).mean()}
        factors = torch.cat([1 + self.scaling * (2 * self.uniform(len(part)) - 1) for part in parts])
        scaled = self.teacher_probabilities(resized_content(views, factors))
        target = undo_each(transforms, resized_content(scaled, 1 / factors))
        known = undo_each(transforms, resizing_keeps(views.shape[2:], factors))
        return {"consistency": self.weight(step) * self.masked_mean(squared_difference(student, target), known)}

    def draw_symmetries(self, patches: int) -> list[Symmetry]:
        """One element of the group for each of this rank's patches, drawn on the host for the global batch."""
        drawn = random.choices(self.group, k=patches * self.ranks.size)
        return [drawn[row] for row in self.ranks.rows(patches)]
