from __future__ import annotations

import pytest
import torch
from torch import nn

from nnssl.networks.ensemble import Ensemble, member_numbers
from nnssl.networks.memory_format import layout_of, set_memory_format
from nnssl.networks.unwrap import deep_supervision


class _Net(nn.Module):
    """Logits from a layer of any kernel size; two heads with deep supervision."""

    def __init__(self, kernel: int):
        super().__init__()
        self.layer = nn.Conv2d(1, 3, kernel, padding=kernel // 2)
        self.decoder = nn.Module()
        self.decoder.deep_supervision = False

    def forward(self, x):
        logits = self.layer(x)
        return [logits, logits[..., ::2, ::2]] if self.decoder.deep_supervision else logits


@pytest.fixture
def networks():
    torch.manual_seed(0)
    return [_Net(1), _Net(3)]


@pytest.mark.parametrize("regions", [False, True])
def test_mean_of_the_probabilities_of_different_architectures(networks, regions):
    def probabilities(logits):
        return logits.sigmoid() if regions else logits.softmax(1)

    x = torch.randn(2, 1, 8, 8)
    expected = sum(probabilities(network(x)) for network in networks) / 2
    torch.testing.assert_close(probabilities(Ensemble(networks, regions)(x)), expected)


@pytest.mark.parametrize("regions", [False, True])
def test_known_values_and_extreme_logits(regions):
    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return torch.tensor([[self.value, 0.0]])

    mean = Ensemble([Constant(1000.0), Constant(-1000.0)], regions)(torch.zeros(1))
    assert mean.isfinite().all()
    probabilities = mean.sigmoid() if regions else mean.softmax(1)
    torch.testing.assert_close(probabilities, torch.tensor([[0.5, 0.5]]))


def test_equal_members_give_their_own_probabilities(networks):
    x = torch.randn(1, 1, 8, 8)
    mean = Ensemble([networks[0]] * 3)(x)
    torch.testing.assert_close(mean.softmax(1), networks[0](x).softmax(1))
    torch.testing.assert_close(mean.exp().sum(1), torch.ones(1, 8, 8))


def test_half_precision_members_are_averaged_in_float32(networks):
    assert Ensemble(networks).bfloat16()(torch.randn(1, 1, 8, 8).bfloat16()).dtype == torch.float32


def test_heads_of_deep_supervision(networks):
    ensemble = Ensemble(networks)
    x = torch.randn(2, 1, 8, 8)
    with deep_supervision(ensemble, True):
        heads = ensemble(x)
    assert [head.shape[-1] for head in heads] == [8, 4]
    assert not any(network.decoder.deep_supervision for network in networks)
    torch.testing.assert_close(heads[0], ensemble(x))


def test_layout_is_that_of_the_members(networks):
    assert layout_of(Ensemble(networks)) == torch.contiguous_format
    for network in networks:
        set_memory_format(network, torch.channels_last)
    assert layout_of(Ensemble(networks)) == torch.channels_last


def test_members_are_known_by_the_names_of_their_weights(networks):
    assert member_numbers(Ensemble(networks).state_dict()) == [0, 1]
    assert member_numbers(networks[0].state_dict()) == []
    alone = Ensemble({1: networks[1]})
    assert member_numbers(alone.state_dict()) == [1]
    x = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(alone(x).softmax(1), networks[1](x).softmax(1))
