from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from nnssl.networks.memory_format import layout_named, layout_of, set_memory_format

SHAPES = {2: (3, 4, 6, 10), 3: (3, 4, 6, 5, 8)}
CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


def small_network(dimensions: int, affine: bool = True) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(
        CONVOLUTIONS[dimensions](4, 8, 3, padding=1),
        NORMS[dimensions](8, affine=affine),
        nn.LeakyReLU(inplace=True),
        CONVOLUTIONS[dimensions](8, 4, 3, padding=1),
        NORMS[dimensions](4, affine=affine),
    ).double()
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def example(dimensions: int) -> torch.Tensor:
    return torch.randn(SHAPES[dimensions], dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_names_of_memory_formats():
    assert layout_named("contiguous", 3) == torch.contiguous_format
    assert layout_named("channels_last", 2) == torch.channels_last
    assert layout_named("channels_last", 3) == torch.channels_last_3d


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_channels_last_changes_neither_outputs_nor_gradients(dimensions, affine):
    plain = small_network(dimensions, affine)
    layout = layout_named("channels_last", dimensions)
    other = deepcopy(plain)
    set_memory_format(other, layout)
    weights = torch.randn(SHAPES[dimensions], dtype=torch.float64)
    inputs = [example(dimensions).requires_grad_(), example(dimensions).contiguous(memory_format=layout)]
    inputs[1].requires_grad_()
    outputs = [plain(inputs[0]), other(inputs[1])]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)
    for output in outputs:
        (output * weights).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(other.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_prediction_without_gradients_agrees_with_training(dimensions, dtype):
    network = small_network(dimensions).to(dtype)
    set_memory_format(network, layout_named("channels_last", dimensions))
    x = example(dimensions).to(dtype).contiguous(memory_format=layout_named("channels_last", dimensions))
    with_graph = network(x)
    with torch.no_grad():
        without = network(x)
    torch.testing.assert_close(without, with_graph, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("dimensions", [2, 3])
def test_norms_keep_the_layout(dimensions, gradient, batch):
    network = small_network(dimensions).float()
    layout = layout_named("channels_last", dimensions)
    set_memory_format(network, layout)
    with torch.set_grad_enabled(gradient):
        x = network[0](example(dimensions)[:batch].float()).contiguous(memory_format=layout)
        output = network[1](x)
    assert output.is_contiguous(memory_format=layout)
    assert not output.is_contiguous()


def test_weights_and_names_stay_and_the_layout_can_be_taken_back():
    network = small_network(3)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    kinds = [type(module) for module in network]
    parameters = list(network.parameters())
    set_memory_format(network, torch.channels_last_3d)
    assert layout_of(network) == torch.channels_last_3d
    assert layout_of(deepcopy(network)) == torch.channels_last_3d
    assert isinstance(network[1], nn.InstanceNorm3d)
    assert type(network[1]) is not nn.InstanceNorm3d
    set_memory_format(network, torch.contiguous_format)
    assert layout_of(network) == torch.contiguous_format
    assert [type(module) for module in network] == kinds
    assert all(mine is theirs for mine, theirs in zip(network.parameters(), parameters, strict=True))
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_norm_with_running_statistics_is_left_alone():
    network = nn.Sequential(nn.InstanceNorm3d(2, track_running_stats=True))
    set_memory_format(network, torch.channels_last_3d)
    assert type(network[0]) is nn.InstanceNorm3d


def test_a_network_never_laid_out_is_contiguous():
    assert layout_of(nn.Linear(2, 2)) == torch.contiguous_format
