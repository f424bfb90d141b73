"""Further targets of labeled patches, made from their segmentation where they are augmented."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform

TargetFunction = Callable[[torch.Tensor], torch.Tensor]


class AppendTargets(BasicTransform):
    """Appends targets to the segmentations of a patch, the only place from which nnU-Net's loader takes them along.

    Args:
        functions: each makes a target from the segmentation at full resolution ``(C, *P)``.
    """

    def __init__(self, functions: Mapping[str, TargetFunction]):
        super().__init__()
        self.functions = functions

    def apply(self, data_dict: dict[str, Any], **params: Any) -> dict[str, Any]:
        segmentation = data_dict["segmentation"]
        heads = segmentation if isinstance(segmentation, list) else [segmentation]
        data_dict["segmentation"] = [*heads, *(function(heads[0]) for function in self.functions.values())]
        return data_dict


def split_targets(batch: dict[str, Any], names: list[str]) -> None:
    """Moves what `AppendTargets` has appended from ``batch["target"]`` to ``batch["extra"]``, by name."""
    if names:
        heads = batch["target"]
        batch["target"], appended = heads[: -len(names)], heads[-len(names) :]
        batch["extra"] = dict(zip(names, appended, strict=True))
