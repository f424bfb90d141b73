from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from nnssl.augmentation.strong import APPLIED, NUMBERS, blur, strong_view, with_contrast, with_gamma


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 3, 12, 10), (2, 1, 12, 10, 8)])
def test_blur_is_the_gaussian_filter_of_scipy(shape):
    x = images(*shape)
    spreads = torch.tensor([0.7, 1.1, 0.5, 0.9, 1.3, 0.6], dtype=torch.float64)[: shape[0] * shape[1]]
    spreads = spreads.reshape(shape[:2])
    found = blur(x, spreads)
    for n in range(shape[0]):
        for c in range(shape[1]):
            spread = float(spreads[n, c])
            expected = gaussian_filter(x[n, c].numpy(), spread, mode="nearest", radius=4)
            np.testing.assert_allclose(found[n, c].numpy(), expected, atol=1e-10)


def test_no_patches_have_no_strong_view():
    x = torch.zeros(0, 2, 6, 6)
    assert strong_view(x, torch.zeros(0, 2, NUMBERS), x).shape == x.shape


def test_contrast_scales_about_the_mean_within_the_range():
    x = torch.tensor([[[0.0, 1.0, 2.0, 5.0]]])
    torch.testing.assert_close(with_contrast(x, torch.tensor([[0.5]])), torch.tensor([[[1.0, 1.5, 2.0, 3.5]]]))
    torch.testing.assert_close(with_contrast(x, torch.tensor([[2.0]])), torch.tensor([[[0.0, 0.0, 2.0, 5.0]]]))


def test_gamma_bends_and_keeps_mean_and_deviation():
    x = images(1, 1, 400)
    bent = with_gamma(x, torch.tensor([[1.5]], dtype=torch.float64))
    assert bent.mean().item() == pytest.approx(x.mean().item(), abs=1e-9)
    assert bent.std().item() == pytest.approx(x.std().item(), abs=1e-9)
    assert (bent - x).abs().max() > 0.1
    # the order of intensities stays
    assert torch.equal(bent.flatten().argsort(), x.flatten().argsort())


def test_what_is_not_drawn_changes_nothing():
    x = images(2, 2, 6, 5, 4)
    nothing = torch.full((2, 2, NUMBERS), 0.99, dtype=torch.float64)
    assert torch.equal(strong_view(x, nothing, torch.ones_like(x)), x)


def test_patches_and_channels_are_changed_on_their_own():
    x = images(2, 2, 6, 5, 4)
    numbers = torch.full((2, 2, NUMBERS), 0.99, dtype=torch.float64)
    numbers[0, 1, 0] = 0.0  # brightness
    view = strong_view(x, numbers, torch.zeros_like(x))
    torch.testing.assert_close(view[0, 1], x[0, 1] * (0.6 + 0.8 * 0.99))
    view[0, 1] = x[0, 1]
    assert torch.equal(view, x)


def test_noise_and_blur_share_a_number():
    x = images(1, 1, 8, 8, 8)
    numbers = torch.full((1, 1, NUMBERS), 0.99, dtype=torch.float64)
    numbers[..., 3] = 0.75 * APPLIED  # noise alone
    view = strong_view(x, numbers, torch.ones_like(x))
    torch.testing.assert_close(view, x + 0.3 * 0.99)
    numbers[..., 3] = 0.25 * APPLIED
    torch.testing.assert_close(
        strong_view(x, numbers, torch.zeros_like(x)), blur(x, torch.tensor([[0.5 + 0.99]], dtype=torch.float64))
    )


def test_constant_patches_stay_finite():
    x = torch.ones(1, 1, 6, 6, 6)
    view = strong_view(x, torch.zeros(1, 1, NUMBERS), torch.zeros_like(x))
    assert view.isfinite().all()


def test_numbers_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="random numbers"):
        strong_view(torch.ones(2, 1, 4, 4), torch.zeros(2, 1, 3), torch.ones(2, 1, 4, 4))
