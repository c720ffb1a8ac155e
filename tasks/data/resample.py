"""From the native grid to the plan's and back, and intensities to a common scale. No chance in it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: voxels of a channel that percentiles are taken from, at least (torch.quantile takes 16 million in all)
SAMPLE = 100_000


def grid(shape: Sequence[int], spacing: Sequence[float], wanted: Sequence[float] | None) -> tuple[int, ...]:
    """The shape nearest to `wanted` spacing (mm) over the same extent as `shape` at `spacing` (mm)."""
    if wanted is None:
        return tuple(shape)
    return tuple(max(1, round(n * s / w)) for n, s, w in zip(shape, spacing, wanted, strict=True))


def resample(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Linear resampling of `CHW[D]` over the same extent, one axis at a time.

    Where it shrinks, the filter widens with the step, so that nothing aliases.
    """
    for axis, size in enumerate(shape, start=1):
        if x.shape[axis] == size:
            continue
        rows = x.movedim(axis, -1)
        flat = rows.reshape(1, 1, -1, rows.shape[-1])
        # torch has this filter for 2D only: the other axis is all rows, and stays as it is
        flat = F.interpolate(
            flat, (flat.shape[2], size), mode="bilinear", align_corners=False, antialias=True
        )
        x = flat.reshape(*rows.shape[:-1], size).movedim(-1, axis)
    return x.contiguous()


def hardest(scores: Sequence[Tensor] | Tensor, shape: Sequence[int]) -> Tensor:
    """Class of the largest score on the grid `shape`: K scores `HW[D]` to uint8 `HW[D]`.

    One class at a time, so a large volume is never held K times.
    """
    best = resample(scores[0][None], shape)[0]
    label = torch.zeros(tuple(shape), dtype=torch.uint8, device=best.device)
    for k in range(1, len(scores)):
        score = resample(scores[k][None], shape)[0]
        higher = score > best
        label[higher] = k
        best = torch.where(higher, score, best)
    return label


def resample_mask(mask: Tensor, classes: int, shape: Sequence[int]) -> Tensor:
    """A class map `HW[D]` on the grid `shape`: the class that fills most of each voxel, uint8."""
    if tuple(mask.shape) == tuple(shape):
        return mask
    return hardest([(mask == k).float() for k in range(classes)], shape)


def window(image: Tensor, low: float, high: float) -> Tensor:
    """Intensities from `low` to `high` (raw units, HU for CT) onto -1 to 1, cut off beyond."""
    return (image.clamp(low, high) - low) * (2 / (high - low)) - 1


def fixed(image: Tensor, low: float, high: float, mean: float, deviation: float) -> Tensor:
    """Intensities cut at `low` and `high`, less `mean`, over `deviation`: one scale for all (raw units)."""
    return (image.clamp(low, high) - mean) / deviation


def zscore(image: Tensor, low: float, high: float) -> Tensor:
    """Each channel of `CHW[D]` cut at its percentiles `low` and `high`, then to mean 0 and deviation 1."""
    flat = image.flatten(1)
    sample = flat[:, :: max(1, flat.shape[1] // SAMPLE)]
    bounds = torch.quantile(sample, torch.tensor([low, high], device=image.device) / 100, dim=1)
    flat = flat.clamp(bounds[0][:, None], bounds[1][:, None])
    mean = flat.mean(1, keepdim=True)
    # a constant image stays zero instead of dividing by nothing
    spread = flat.std(1, keepdim=True, correction=0).clamp_min(1e-6 * (1 + mean.abs()))
    return ((flat - mean) / spread).view_as(image)
