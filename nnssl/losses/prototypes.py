"""Structures of patches as single vectors, and losses that compare such vectors."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize


def masked_prototypes(
    features: torch.Tensor, masks: torch.Tensor, min_voxels: float = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean feature of every structure of every patch, scaled to length 1, in float32.

    Args:
        features: ``(N, C, *S)``.
        masks: ``(N, K, *S)``, boolean, or probabilities, which weigh the voxels.
        min_voxels: structures with a smaller sum of their mask are not present.

    Returns:
        Prototypes ``(N, K, C)``, and which are present ``(N, K)``; those that are not are zero.
    """
    weights, values = masks.float().flatten(2), features.float().flatten(2)
    volume = weights.sum(2)
    present = volume >= min_voxels
    # outside of autocast, where a sum over 10^5 voxels in half precision would overflow
    with torch.autocast(features.device.type, enabled=False):
        means = torch.bmm(weights, values.transpose(1, 2)) / volume.clamp_min(1e-6)[..., None]
    return normalize(means, dim=2) * present[..., None], present


def structure_contrast(prototypes: torch.Tensor, present: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """InfoNCE over structures: the same structure attracts across patches, all other structures repel.

    With ``s(a, b) = exp(a . b / temperature)``, A the present prototypes with at least one positive, and P the other
    patches that show structure k::

        - 1/|A| sum_{(n,k) in A} 1/|P| sum_{m in P} log( s(p_nk, p_mk) / sum_{(m',k') != (n,k)} s(p_nk, p_m'k') )

    Nothing waits for the device.

    Args:
        prototypes: ``(N, K, C)`` of length 1.
        present: ``(N, K)`` boolean; the others play no part.
        temperature: above 0.

    Returns:
        Scalar, 0 without gradient where no prototype has a positive.
    """
    patches, structures = present.shape
    vectors, shown = prototypes.flatten(0, 1).float(), present.flatten()
    patch = torch.arange(patches, device=shown.device).repeat_interleave(structures)
    structure = torch.arange(structures, device=shown.device).repeat(patches)
    with torch.autocast(shown.device.type, enabled=False):
        similarity = vectors @ vectors.T / temperature
    itself = torch.eye(len(shown), dtype=torch.bool, device=shown.device)
    others = similarity.masked_fill(itself | ~shown, torch.finfo(similarity.dtype).min)
    log_share = similarity - others.logsumexp(1, keepdim=True)
    positive = (structure[:, None] == structure) & (patch[:, None] != patch) & shown[:, None] & shown
    positives = positive.sum(1)
    of_anchor = (log_share * positive).sum(1) / positives.clamp_min(1)
    return -of_anchor.sum() / (positives > 0).sum().clamp_min(1)


def paired_contrast(first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """NT-Xent (Chen et al., ICML 2020, equation 1): row n of both belong together, all other rows repel.

    Args:
        first: ``(N, C)``, of any length.
        second: ``(N, C)``.
        temperature: above 0.

    Returns:
        Scalar; 0 for a single row, which has nothing to be told from.
    """
    vectors = normalize(torch.stack([first, second]).float(), dim=2)
    # views of one sample are one structure in two patches
    return structure_contrast(
        vectors, torch.ones(vectors.shape[:2], dtype=torch.bool, device=first.device), temperature
    )
