from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nnssl.networks.micro_batch import in_parts
from nnssl.trainers.engine.memory_meter import MemoryMeter

IMAGES = torch.randn(5, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def two_heads(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Dropout(dropout), nn.LeakyReLU(), nn.Conv2d(4, 3, 1)
    ).double()


def heads(network: nn.Module):
    return lambda images: [output := network(images), output[..., ::2, ::2].tanh()]


def batch_dice(outputs: list[torch.Tensor]) -> torch.Tensor:
    """A loss that is no mean over samples."""
    full, half = outputs
    p = full.softmax(1)
    return p[:, 0].square().sum() / p.sum() + full.std(0).mean() * half.square().sum().sqrt()


def gradients(network: nn.Module, size: int | None) -> list[torch.Tensor]:
    network.zero_grad()
    batch_dice(in_parts(heads(network), IMAGES, size)).backward()
    return [p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
def test_outputs_and_gradients_are_those_of_one_pass_for_a_loss_over_all_samples(size):
    network = two_heads()
    for part, whole in zip(in_parts(heads(network), IMAGES, size), heads(network)(IMAGES), strict=True):
        torch.testing.assert_close(part, whole)
    for part, whole in zip(gradients(network, size), gradients(network, None), strict=True):
        torch.testing.assert_close(part, whole)


def test_a_part_drops_the_same_units_when_it_is_computed_again():
    network = two_heads(dropout=0.5)
    torch.manual_seed(1)
    outputs = in_parts(heads(network), IMAGES, 2)
    batch_dice(outputs).backward()
    first = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    torch.manual_seed(1)
    kept = [torch.cat(parts) for parts in zip(*map(heads(network), IMAGES.split(2)), strict=True)]
    batch_dice(kept).backward()
    for part, whole in zip(first, network.parameters(), strict=True):
        torch.testing.assert_close(part, whole.grad)


def test_without_gradients_nothing_is_computed_twice():
    calls = []

    def count(images: torch.Tensor) -> list[torch.Tensor]:
        calls.append(len(images))
        return [images]

    with torch.no_grad():
        in_parts(count, IMAGES, 2)
    assert calls == [2, 2, 1]


def test_parts_take_the_memory_of_one():
    peaks = {}
    for size in (None, 2, 1):
        with FakeTensorMode(), MemoryMeter("cpu") as meter:
            network = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())))
            images = torch.randn(4, 8, 64, 64)
            in_parts(lambda part, network=network: [network(part)], images, size)[0].mean().backward()
        peaks[size] = meter.peak
    # beside the activations of all patches there are inputs, outputs and their gradients
    assert peaks[2] < 0.7 * peaks[None]
    assert peaks[1] < 0.5 * peaks[None]


def test_no_part_is_empty():
    with pytest.raises(ValueError, match="at least 1"):
        in_parts(lambda images: [images], IMAGES, 0)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_further_tensors_are_split_alike(size):
    first, second = IMAGES.clone().requires_grad_(), (2 * IMAGES).requires_grad_()
    in_parts(lambda a, b: [(a * b).sum(1)], first, size, second)[0].square().sum().backward()
    product = (IMAGES * 2 * IMAGES).sum(1, keepdim=True)
    torch.testing.assert_close(first.grad, 2 * product * 2 * IMAGES)
    torch.testing.assert_close(second.grad, 2 * product * IMAGES)
