"""Windows of patches that are replaced by windows of other patches, from other places.

Windows are found on a grid of cells, a few voxels per axis each, which every function here works on unless it says
voxels. Nothing waits for the device: windows of a batch have places and edges of their own, kept in tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import avg_pool2d, avg_pool3d, max_pool2d, max_pool3d

SHORT = 16
"""Along axes of fewer voxels a cell is one voxel, and the edges of windows are not limited."""


class Windows(NamedTuple):
    """One window per patch.

    Attributes:
        corners: its first cell ``(N, d)``.
        edges: its cells along each axis ``(N, d)``.
        found: whether there is one ``(N,)``; where there is none, the rest means nothing.
        means: confidence in it ``(N,)``.
    """

    corners: torch.Tensor
    edges: torch.Tensor
    found: torch.Tensor
    means: torch.Tensor


def cell_edges(shape: Sequence[int]) -> tuple[int, ...]:
    """Edges of a cell in voxels: 4 where that divides the axis of the patch, else 2 or 1; 1 on short axes.

    >>> cell_edges((128, 50, 7))
    (4, 2, 1)
    """
    return tuple(1 if n < SHORT else next(edge for edge in (4, 2, 1) if n % edge == 0) for n in shape)


def largest_edges(shape: Sequence[int], share: float) -> tuple[int, ...]:
    """Largest edges of a window in cells: ``share`` of the patch, but at least one cell; a short axis is no limit."""
    return tuple(
        n if n < SHORT else max(1, round(n * share) // cell) for n, cell in zip(shape, cell_edges(shape), strict=True)
    )


def cell_means(voxels: torch.Tensor) -> torch.Tensor:
    """Means of the cells of patches ``(N, C, *P)``."""
    cells = cell_edges(voxels.shape[2:])
    return {2: avg_pool2d, 3: avg_pool3d}[len(cells)](voxels, cells)


def cells_with(voxels: torch.Tensor) -> torch.Tensor:
    """Cells in which any voxel of ``(N, 1, *P)`` is True."""
    cells = cell_edges(voxels.shape[2:])
    return {2: max_pool2d, 3: max_pool3d}[len(cells)](voxels.float(), cells) > 0


def constant_voxels(images: torch.Tensor) -> torch.Tensor:
    """Voxels of blocks of two voxels per axis in which no channel of ``(N, C, *P)`` changes; ``(N, 1, *P)``.

    Padding is constant, whatever changes of intensity came after it, noise excepted.
    """
    pool = {2: max_pool2d, 3: max_pool3d}[images.ndim - 2]
    same = (pool(images, 2, stride=1) == -pool(-images, 2, stride=1)).all(1, keepdim=True)
    return pool(same.float(), 2, stride=1, padding=1) > 0


def window_means(values: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Means of the windows with given edges ``(N, d)`` that begin at each cell of ``(N, C, *S)``.

    Where the window would leave the patch, the result means nothing (see `fits`).
    """
    for axis in range(2, values.ndim):
        n, edge = values.shape[axis], edges[:, axis - 2, None, None]
        cells = torch.arange(n, device=values.device)
        member = (cells >= cells[:, None]) & (cells < cells[:, None] + edge)
        lines = values.movedim(axis, -1)
        sums = lines.flatten(1, -2) @ member.to(values.dtype).transpose(1, 2)
        values = (sums / edge).view(lines.shape).movedim(-1, axis)
    return values


def fits(shape: Sequence[int], first: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Cells between ``first`` and ``last``, both ``(N, d)`` and inclusive; boolean ``(N, 1, *shape)``."""
    inside = torch.ones((len(first), 1, *shape), dtype=torch.bool, device=first.device)
    for axis, n in enumerate(shape):
        cells = torch.arange(n, device=first.device)
        along = (cells >= first[:, axis, None]) & (cells <= last[:, axis, None])
        inside = inside & along.view(-1, 1, *(n if other == axis else 1 for other in range(len(shape))))
    return inside


def target_windows(
    region: torch.Tensor, confidence: torch.Tensor, usable: torch.Tensor, largest: Sequence[int]
) -> Windows:
    """The bounding box of a region, or the part of it with the lowest confidence if it is too large.

    Args:
        region: boolean ``(N, 1, *S)``.
        confidence: ``(N, 1, *S)``.
        usable: boolean ``(N, 1, *S)``; a window has no other cells.
        largest: edges that a window may have.
    """
    shape = region.shape[2:]
    first, last = (torch.stack(ends, 1) for ends in zip(*_ends(region), strict=True))
    spans = (last - first + 1).clamp_min(1).unbind(1)
    # numbers of the host enter one by one: a tensor made of them would have to be waited for
    edges = torch.stack([span.clamp_max(limit) for span, limit in zip(spans, largest, strict=True)], 1)
    free = fits(shape, first, last - edges + 1) & (window_means((~usable).float(), edges) == 0)
    means = window_means(confidence, edges).masked_fill(~free, torch.inf).flatten(1)
    lowest, at = means.min(1)
    return Windows(_corners(at, shape), edges, lowest.isfinite(), lowest)


def source_windows(
    targets: Windows,
    own_logits: torch.Tensor,
    logits: torch.Tensor,
    confidence: torch.Tensor,
    usable: torch.Tensor,
    threshold: float,
    divergence: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    candidates: int = 4,
) -> Windows:
    """For each target the window of another patch that shows what is most alike, among the most confident ones.

    Candidates do not overlap, have the edges of the target, and at least ``threshold`` and the target's mean of
    confidence.

    Args:
        targets: windows in patches with ``own_logits``.
        own_logits: ``(N, K, *S)``.
        logits: ``(N, K, *S)`` of the patches that sources are taken from.
        confidence: ``(N, 1, *S)`` of these.
        usable: boolean ``(N, 1, *S)``; a window has no other cells.
        threshold: least mean of a candidate's confidence.
        divergence: of logits ``(N, 1, K)``, the target's means, and ``(N, candidates, K)``; the least one is taken.
        candidates: how many are compared.
    """
    shape, edges = logits.shape[2:], targets.edges
    ends = torch.stack([n - edge for n, edge in zip(shape, edges.unbind(1), strict=True)], 1)
    scores = window_means(confidence, edges)
    free = fits(shape, torch.zeros_like(ends), ends) & (window_means((~usable).float(), edges) == 0)
    least = targets.means.clamp_min(threshold).view(-1, *[1] * (scores.ndim - 1))
    scores = scores.masked_fill(~(free & (scores >= least)), -torch.inf)
    places, means = [], []
    for _ in range(candidates):
        mean, at = scores.flatten(1).max(1)
        corner = _corners(at, shape)
        scores = scores.masked_fill(fits(shape, corner - edges + 1, corner + edges - 1), -torch.inf)
        places.append(at)
        means.append(mean)
    at, mean = torch.stack(places, 1), torch.stack(means, 1)
    ours = _at(window_means(own_logits, edges), _places(targets.corners, shape)[:, None])
    apart = divergence(ours, _at(window_means(logits, edges), at)).masked_fill(mean.isinf(), torch.inf)
    best = apart.argmin(1, keepdim=True)
    mean = mean.gather(1, best)[:, 0]
    return Windows(_corners(at.gather(1, best)[:, 0], shape), edges, targets.found & mean.isfinite(), mean)


def replaced(images: torch.Tensor, others: torch.Tensor, targets: Windows, sources: Windows) -> torch.Tensor:
    """Patches ``(N, C, *P)`` with the source windows of ``others`` in their target windows, where both are found."""
    shape = images.shape[2:]
    inside = replaced_voxels(targets, sources, shape)
    axes = range(len(shape))
    rows = torch.arange(len(images), device=images.device).view(-1, 1, *[1] * len(axes))
    channels = torch.arange(images.shape[1], device=images.device).view(1, -1, *[1] * len(axes))
    places = []
    for axis, (n, cell) in enumerate(zip(shape, cell_edges(shape), strict=True)):
        moved = (sources.corners[:, axis, None] - targets.corners[:, axis, None]) * cell
        along = (torch.arange(n, device=images.device) + moved).clamp(0, n - 1)
        places.append(along.view(-1, 1, *(n if other == axis else 1 for other in axes)))
    return torch.where(inside, others[(rows, channels, *places)], images)


def replaced_voxels(targets: Windows, sources: Windows, shape: Sequence[int]) -> torch.Tensor:
    """Voxels of patches of this shape that are replaced; boolean ``(N, 1, *shape)``."""
    cells = cell_edges(shape)
    first, edges = (
        torch.stack([part * cell for part, cell in zip(parts.unbind(1), cells, strict=True)], 1)
        for parts in (targets.corners, targets.edges)
    )
    inside = fits(shape, first, first + edges - 1)
    return inside & sources.found.view(-1, *[1] * (inside.ndim - 1))


def _ends(region: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """First and last cell ``(N,)`` of a region along each axis."""
    for axis in range(2, region.ndim):
        hit = region.movedim(axis, 1).flatten(2).any(2)
        cells = torch.arange(hit.shape[1], device=region.device)
        yield torch.where(hit, cells, hit.shape[1]).amin(1), torch.where(hit, cells, -1).amax(1)


def _corners(places: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Coordinates ``(N, d)`` of numbers of cells ``(N,)``."""
    coordinates = []
    for n in reversed(shape):
        coordinates.append(places % n)
        places = places // n
    return torch.stack(coordinates[::-1], 1)


def _places(corners: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Numbers of cells ``(N,)`` of coordinates ``(N, d)``."""
    places = torch.zeros_like(corners[:, 0])
    for axis, n in enumerate(shape):
        places = places * n + corners[:, axis]
    return places


def _at(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Values ``(N, K, *S)`` of cells with numbers ``(N, M)``; ``(N, M, K)``."""
    flat = values.flatten(2)
    return flat.gather(2, places[:, None].expand(-1, flat.shape[1], -1)).transpose(1, 2)
