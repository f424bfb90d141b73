"""Labeled rows made in pairs of different cases, which exchange the content of random boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnssl.augmentation.regional_switch import RegionalSwitch, switch
from nnssl.dataloading.correspondence import Correspondence
from nnssl.dataloading.rows import RowsLoader
from nnssl.dataloading.streams import numpy_seeded


@dataclass(frozen=True)
class Pair:
    """Rows that are made of two cases, as far as it is decided for the whole batch.

    The leader's patch is placed as nnU-Net does, the follower's at the corresponding position. But patches on
    foreground, which nnU-Net lets reach beyond the upper borders of an image, stay where its random ones lie, so that
    the image fills both.
    """

    leading_row: int
    leader: str
    follower: str
    seed: int


class AtlasPairsLoader(RowsLoader):
    """Rows 2k and 2k + 1 are two patches of different cases at corresponding positions, switched or left as they are.

    The switch comes before the transforms, so that intensities are changed after it and the targets of all heads are
    exact. Of each pair the last row leads. Both patches are likely to show foreground if the leader does, so it is made
    to with the mean of what nnU-Net asks of the rows of the pair, and always where it is centered on a rare class. In a
    batch with an odd number of rows the last one leads a pair whose other patch is not used. Cases, place and region of
    a pair depend on the batch and on the pair alone, so that each row can be made on its own.

    Args:
        arguments: of `RowsLoader`.
        switch: how regions are drawn.
        correspondence: of positions in the cases.
        options: of `RowsLoader`.

    """

    def __init__(self, *arguments: Any, switch: RegionalSwitch, correspondence: Correspondence, **options: Any):
        super().__init__(*arguments, **options)
        self.check_cases()
        self.switch = switch
        self.correspondence = correspondence
        self._pairs: list[Pair] = []
        self._partner: tuple[Any, list[list[int]]] | None = None
        self._region: torch.Tensor | None = None
        self._transforms_after: Any = options.get("transforms")
        self.transforms = self._switch_and_transform

    def check_cases(self) -> None:
        """Raises ``ValueError`` if pairs cannot be made of the cases."""
        if len(self.indices) < 2:
            raise ValueError("a pair needs two cases")

    def draw_cases(self) -> list[str]:
        cases = super().draw_cases()
        rows = self.whole_batch_size
        self._pairs = []
        for first in range(0, rows, 2):
            leading = min(first + 1, rows - 1)
            leader = cases[leading]
            follower = self.partner(leader, cases[first])
            if leading != first:
                cases[first] = follower
            self._pairs.append(Pair(leading, leader, follower, int(np.random.randint(2**32, dtype=np.uint64))))
        return cases

    def partner(self, leader: str, drawn: str) -> str:
        """The case that follows ``leader``; ``drawn`` was drawn for its row, or is the leader if that has none."""
        return self._other_than(leader) if drawn == leader else drawn

    @property
    def pair(self) -> Pair:
        """The pair that the present row belongs to."""
        return self._pairs[self._position // 2]

    def get_bbox(
        self,
        data_shape: Any,
        force_fg: bool,
        class_locations: dict | None,
        overwrite_class: Any = None,
        verbose: bool = False,
    ) -> tuple[list[int], list[int]]:
        """Where the patch of this row lies; notes where that of its partner does, and which region they exchange."""
        pair = self.pair
        leads = self._position == pair.leading_row
        other = self._data.load_case(pair.follower if leads else pair.leader)
        shapes = [tuple(data_shape), tuple(other[0].shape[1:])]
        leader_shape, follower_shape = shapes if leads else reversed(shapes)
        locations = class_locations if leads else other[3]["class_locations"]
        with numpy_seeded(pair.seed):
            show = self._shows_foreground(pair)
            chosen = self._centers.get(pair.leading_row) if show else None
            lower, _ = nnUNetDataLoader.get_bbox(self, leader_shape, show, locations, chosen, verbose)
            lower = np.minimum(lower, self._highest_corner(leader_shape))
            region = self.switch.draw(self.patch_size, self.final_patch_size, np.random.default_rng(pair.seed))
        corners = [[int(n) for n in lower], self._corresponding(pair, lower, leader_shape, follower_shape)]
        own, others = corners if leads else reversed(corners)
        self._partner = other, [[n, n + int(edge)] for n, edge in zip(others, self.patch_size, strict=True)]
        self._region = region
        return own, [n + int(edge) for n, edge in zip(own, self.patch_size, strict=True)]

    def _shows_foreground(self, pair: Pair) -> bool:
        last = pair.leading_row
        asked = [self._show_foreground(row) for row in range(last - last % 2, last + 1)]
        return last in self._centers or all(asked) or (any(asked) and np.random.uniform() < np.mean(asked))

    def _corresponding(self, pair: Pair, lower: Any, leader_shape: Any, follower_shape: Any) -> list[int]:
        """Lower corner of the follower's patch, whose center lies within the case."""
        half = np.asarray(self.patch_size) / 2
        center = self.correspondence.position(
            np.asarray(lower) + half, (pair.leader, leader_shape), (pair.follower, follower_shape)
        )
        return [int(n) for n in np.rint(np.clip(center, 0.5, np.asarray(follower_shape) - 0.5) - half)]

    def _highest_corner(self, shape: Any) -> np.ndarray:
        """The last of the lower corners from which nnU-Net draws random patches."""
        room = np.asarray(shape) - np.asarray(self.patch_size)
        return room + (np.maximum(self.need_to_pad, -room) + 1) // 2

    def _switch_and_transform(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, Any]:
        if self._region is not None and self._partner is not None:
            region = self._region[0] if self.patch_size_was_2d else self._region
            other_image, other_segmentation = self._crop(*self._partner)
            image, _ = switch(image, other_image, region)
            segmentation, _ = switch(segmentation, other_segmentation, region)
        if self._transforms_after is None:
            return {"image": image, "segmentation": segmentation}
        return self._transforms_after(image=image, segmentation=segmentation)

    def _crop(self, case: Any, box: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and labels, in a cascade with those of the stage before, as nnU-Net cuts them for the transforms."""
        image, segmentation, previous, _ = case
        patch = torch.from_numpy(crop_and_pad_nd(image, box, 0)).float()
        labels = torch.from_numpy(crop_and_pad_nd(segmentation, box, -1, cast_cropped_to=np.int16)).to(torch.int16)
        if previous is not None:
            before = torch.from_numpy(crop_and_pad_nd(previous, box, -1, cast_cropped_to=np.int16)).to(torch.int16)
            labels = torch.cat((labels, before[None]))
        return (patch[:, 0], labels[:, 0]) if self.patch_size_was_2d else (patch, labels)

    def _other_than(self, case: str) -> str:
        usable = np.array([name != case for name in self.indices], float)
        if self.sampling_probabilities is not None:
            usable *= self.sampling_probabilities
        return self.indices[np.random.choice(len(usable), p=usable / usable.sum())]
