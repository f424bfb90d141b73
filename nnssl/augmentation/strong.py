"""Strong views: changes of intensity that a student must see through, made on the device for a whole batch."""

from __future__ import annotations

import torch
from torch.nn.functional import conv1d, pad

NUMBERS = 8
"""Uniform random numbers that each channel of a patch needs."""

APPLIED = 0.8
"""Probability of each change; that of the blur is half of it."""
_BRIGHTNESS = (0.6, 1.4)
_CONTRAST = (0.6, 1.6)
_GAMMA = (0.6, 1.6)
_BLUR = (0.5, 1.5)
_NOISE = (0.0, 0.3)
_RADIUS = 4


def strong_view(images: torch.Tensor, uniform: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast, gamma, blur and noise, each with some probability, drawn anew for each patch and channel.

    The kinds are those of nnU-Net's augmentation, which has made the weak view before; they are applied more often and
    over wider ranges. No voxel moves, so that labels and predictions of the weak view hold for the strong one. Where
    no change is drawn the channel stays as it is.

    Args:
        images: ``(N, C, *S)``, normalized.
        uniform: random numbers ``(N, C, NUMBERS)``, uniform in [0, 1).
        normal: standard normal noise, like ``images``.

    Returns:
        The shape of ``images``.
    """
    if uniform.shape != (*images.shape[:2], NUMBERS) or normal.shape != images.shape:
        raise ValueError(f"random numbers {tuple(uniform.shape)} and {tuple(normal.shape)} for {tuple(images.shape)}")
    if not len(images):  # steps of a first phase have no unlabeled patches, and convolutions need some
        return images
    gates, values = uniform[..., :4] < APPLIED, uniform[..., 4:]
    brightness = _drawn(_BRIGHTNESS, gates[..., 0], values[..., 0], 1.0)
    contrast = _drawn(_CONTRAST, gates[..., 1], values[..., 1], 1.0)
    gamma = _drawn(_GAMMA, gates[..., 2], values[..., 2], 1.0)
    # one number decides about noise and blur: above half of the probability there is no blur
    blurred = uniform[..., 3] < APPLIED / 2
    spread = _drawn(_BLUR, blurred, values[..., 3], 0.0)
    noise = _drawn(_NOISE, gates[..., 3], values[..., 3], 0.0)
    view = with_gamma(with_contrast(images * _wide(brightness, images), contrast), gamma)
    return blur(view, spread) + normal * _wide(noise, images)


def with_contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Scales each channel ``(N, C, *S)`` about its mean by a factor ``(N, C)``, within its own range of values."""
    axes = tuple(range(2, images.ndim))
    mean = images.mean(axes, keepdim=True)
    lowest, highest = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
    scaled = (images - mean) * _wide(factors, images) + mean
    # the factor 1 is exact
    return torch.where(_wide(factors, images) == 1, images, scaled.clamp(lowest, highest))


def with_gamma(images: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Raises each channel ``(N, C, *S)``, scaled to [0, 1], to a power ``(N, C)``; mean and deviation are kept."""
    axes = tuple(range(2, images.ndim))
    lowest, highest = images.amin(axes, keepdim=True), images.amax(axes, keepdim=True)
    bent = ((images - lowest) / (highest - lowest).clamp_min(1e-7)).pow(_wide(exponents, images))
    deviation, mean = torch.std_mean(images, axes, keepdim=True)
    bent_deviation, bent_mean = torch.std_mean(bent, axes, keepdim=True)
    kept = (bent - bent_mean) / bent_deviation.clamp_min(1e-7) * deviation + mean
    return torch.where(_wide(exponents, images) == 1, images, kept)


def blur(images: torch.Tensor, spreads: torch.Tensor) -> torch.Tensor:
    """Gaussian blur of each channel ``(N, C, *S)`` with standard deviations ``(N, C)`` in voxels; 0 changes nothing.

    Borders are repeated; kernels end after 4 voxels.
    """
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, device=images.device, dtype=images.dtype)
    flat = spreads.reshape(-1, 1).clamp_min(1e-3)
    kernels = torch.exp(-(offsets**2) / (2 * flat**2))
    kernels = (kernels / kernels.sum(1, keepdim=True))[:, None]
    channels = images.flatten(0, 1)
    result = channels
    for axis in range(1, channels.ndim):
        lines = result.movedim(axis, -1)
        shape = lines.shape
        padded = pad(lines.flatten(1, -2), (_RADIUS, _RADIUS), mode="replicate")
        # lines as a batch, channels as groups
        blurred = conv1d(padded.transpose(0, 1), kernels, groups=len(kernels)).transpose(0, 1)
        result = blurred.reshape(shape).movedim(-1, axis)
    return torch.where(_wide(spreads, images) == 0, images, result.reshape(images.shape))


def _drawn(interval: tuple[float, float], gate: torch.Tensor, uniform: torch.Tensor, otherwise: float) -> torch.Tensor:
    low, high = interval
    return torch.where(gate, low + (high - low) * uniform, torch.full_like(uniform, otherwise))


def _wide(numbers: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return numbers.reshape(*numbers.shape, *[1] * (images.ndim - 2))
