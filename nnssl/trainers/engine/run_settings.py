"""How a training is run, as opposed to what the method is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class RunSettings:
    """Settings of one run, stored in its checkpoints so that a resumed run uses the same ones.

    Attributes:
        seed: of weights, patches and augmentation; drawn and recorded when the training starts if None.
        deterministic: bit-exact repetition (slower on CUDA).
        precision: auto, fp32, bf16 or fp16.
        memory_format: contiguous, channels_last, or auto (channels_last on CPUs, measured there in bf16).
        micro_batch: patches in a pass of a network; None for all at once.
        memory_check: whether a training that would not fit into the memory of the device is refused.
        preview_every: epochs from one preview picture to the next; about 20 in a training if None, none at all if 0.
        planned_epochs: epochs by which the phases were planned, if its length was changed since, to end in time.
        pretrained_weights: checkpoint whose weights the student starts from.
    """

    seed: int | None = None
    deterministic: bool = False
    precision: str = "auto"
    memory_format: str = "auto"
    micro_batch: int | None = None
    memory_check: bool = True
    preview_every: int | None = None
    planned_epochs: int | None = None
    pretrained_weights: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
