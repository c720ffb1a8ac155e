"""How far masks' surfaces lie apart, and which lesions were found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor

DISTANCES = ("hd95", "assd")
"""Measures in mm; the others are shares."""


@dataclass(frozen=True)
class Depth:
    """What is measured beside overlap.

    Attributes:
        surface: tolerance in mm; 0: no surface distances, which take far longer than overlap.
        lesion_iou: from which IoU a lesion counts as found, 0: where it is touched; None: lesions are
            not told apart.
    """

    surface: float = 0.0
    lesion_iou: float | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the measures, in the order of `of_masks`."""
        surface = ("surface_dice", "hd95", "assd") if self.surface else ()
        return surface if self.lesion_iou is None else (*surface, "lesion_f1")

    def of_masks(self, truth: Tensor, given: Tensor, spacing: Sequence[float]) -> list[float]:
        """The measures of one class: two bool masks `HW[D]`, mm per axis. NaN: says nothing."""
        found = surfaces(truth, given, spacing, self.surface) if self.surface else ()
        return [*found, *(() if self.lesion_iou is None else (lesion_f1(truth, given, self.lesion_iou),))]


def surfaces(
    truth: Tensor, given: Tensor, spacing: Sequence[float], tolerance: float
) -> tuple[float, float, float]:
    """Surface Dice, 95th percentile of the Hausdorff distance (the larger of both ways), mean distance in mm.

    Surfaces are the voxels at an edge, counted (in Nikolov et al. 2018, arXiv:1809.04430, by their area).
    A mask that is empty on one side alone: surface Dice 0, no distance; on both: nothing.
    """
    if not bool(truth.any()) or not bool(given.any()):
        return (0.0 if bool(truth.any()) or bool(given.any()) else math.nan), math.nan, math.nan
    said, true = get_mask_edges(given.cpu(), truth.cpu())
    ways = (said, true), (true, said)
    both = [torch.as_tensor(get_surface_distance(a, b, spacing=tuple(spacing))) for a, b in ways]
    apart = torch.cat(both)
    near = float((apart <= tolerance).double().mean())
    return near, max(float(d.quantile(0.95)) for d in both), float(apart.double().mean())


def components(mask: Tensor) -> tuple[np.ndarray, int]:
    """Connected components of a bool mask (also over corners), numbered from 1, and how many."""
    found, n = ndimage.label(mask.cpu().numpy(), np.ones((3,) * mask.ndim))
    return found, int(n)


def lesion_f1(truth: Tensor, given: Tensor, iou: float) -> float:
    """F1 of found lesions: connected components that match one of the other mask; NaN where neither has any.

    Args:
        iou: of a match, at least; 0: any overlap.
    """
    (true, n), (said, m) = components(truth), components(given)
    if not n + m:
        return math.nan
    shared = np.bincount((true * (m + 1) + said).ravel(), minlength=(n + 1) * (m + 1)).reshape(n + 1, m + 1)
    union = shared.sum(1)[1:, None] + shared.sum(0)[None, 1:] - shared[1:, 1:]
    match = (shared[1:, 1:] > 0) & (shared[1:, 1:] >= iou * union)
    hit, right = match.any(1).sum(), match.any(0).sum()
    # the misses of both sides: where several parts match one lesion it is found once, and none is wrong
    return float(2 * hit / (2 * hit + (n - hit) + (m - right)))
