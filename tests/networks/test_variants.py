from __future__ import annotations

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnssl.errors import UserError
from nnssl.networks.variants import counterpart

PATH = "dynamic_network_architectures.architectures.unet"
SHARED = {
    "n_stages": 4,
    "features_per_stage": [4, 6, 8, 8],
    "conv_op": "torch.nn.modules.conv.Conv2d",
    "kernel_sizes": [[1, 3], [3, 3], [3, 3], [3, 3]],
    "strides": [[1, 1], [1, 2], [2, 2], [2, 2]],
    "n_conv_per_stage_decoder": [1, 1, 1],
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
    "norm_op_kwargs": {"affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
IMPORTED = ["conv_op", "norm_op", "dropout_op", "nonlin"]
KINDS = {
    "PlainConvUNet": {"n_conv_per_stage": [2, 2, 2, 2]},
    "ResidualEncoderUNet": {"n_blocks_per_stage": [1, 3, 4, 6], "block": "x", "stem_channels": 4},
}


@pytest.mark.parametrize(
    ("kind", "other"), [("PlainConvUNet", "ResidualEncoderUNet"), ("ResidualEncoderUNet", "PlainConvUNet")]
)
def test_the_counterpart_has_the_heads_of_the_planned_network(kind, other):
    arguments = SHARED | KINDS[kind]
    built = counterpart(f"{PATH}.{kind}", arguments, [*IMPORTED, *(["block"] if "block" in arguments else [])])
    assert built.name == f"{PATH}.{other}"
    assert built.imported == IMPORTED
    plain = get_network_from_plans(f"{PATH}.PlainConvUNet", SHARED | KINDS["PlainConvUNet"], IMPORTED, 1, 3,
                                   deep_supervision=True)  # fmt: skip
    network = get_network_from_plans(*built, 1, 3, deep_supervision=True)
    assert type(network).__name__ == other
    x = torch.randn(1, 1, 16, 32)
    assert [head.shape for head in network(x)] == [head.shape for head in plain(x)]
    assert network.decoder.seg_layers[-1].in_channels == 4
    assert arguments == SHARED | KINDS[kind]


def test_numbers_of_blocks_are_those_of_the_planners():
    deep = SHARED | {"n_stages": 7} | KINDS["PlainConvUNet"]
    assert counterpart("x.PlainConvUNet", deep, []).arguments["n_blocks_per_stage"] == [1, 3, 4, 6, 6, 6, 6]
    assert counterpart("x.ResidualEncoderUNet", deep, []).arguments["n_conv_per_stage"] == [2] * 7


def test_other_networks_are_refused():
    with pytest.raises(UserError, match="plain and a residual") as caught:
        counterpart("some.where.Transformer", {}, [])
    assert caught.value.found == "Transformer"
