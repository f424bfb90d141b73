"""The other one of nnU-Net's two U-Nets, with plain or with residual blocks in the encoder, for the same plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from nnssl.errors import UserError

PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"
# nnU-Net's planners
_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6)
_CONVOLUTIONS = 2
# what only one of the two knows
_OWN = ("n_conv_per_stage", "n_blocks_per_stage", "nonlin_first", "block", "bottleneck_channels", "stem_channels")


class Architecture(NamedTuple):
    """A network as nnU-Net's plans describe it.

    Attributes:
        name: import path of its class.
        arguments: of its class.
        imported: arguments that are import paths.
    """

    name: str
    arguments: dict[str, Any]
    imported: list[str]


def counterpart(name: str, arguments: Mapping[str, Any], imported: Sequence[str]) -> Architecture:
    """The residual encoder U-Net for a plain one and the other way round, with nnU-Net's numbers of blocks.

    Stages, features, strides, kernels and decoder stay as planned, so that the heads of deep supervision are alike.
    Arguments are those of `Architecture`.

    Raises:
        UserError: for any other network.
    """
    path, _, kind = name.rpartition(".")
    if kind not in (PLAIN, RESIDUAL):
        raise UserError(
            "this method trains a plain and a residual U-Net, and the plan has neither",
            expected=f"{PLAIN} or {RESIDUAL}",
            found=kind,
            fix="plan with an architecture of nnU-Net, or choose another trainer",
        )
    stages = int(arguments["n_stages"])
    shared = {key: value for key, value in arguments.items() if key not in _OWN}
    if kind == PLAIN:
        shared["n_blocks_per_stage"] = list((_BLOCKS + _BLOCKS[-1:] * stages)[:stages])
    else:
        shared["n_conv_per_stage"] = [_CONVOLUTIONS] * stages
    other = RESIDUAL if kind == PLAIN else PLAIN
    return Architecture(f"{path}.{other}", shared, [key for key in imported if key in shared])
