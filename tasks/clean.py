"""What is done to a predicted mask before it is shown: small parts go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tasks.scoring.surface import components


def cleaned(mask: Tensor, spacing: Sequence[float], *, largest: bool, smallest: float) -> Tensor:
    """A mask (`HW[D]` of class indices) without small connected parts of a class: they become background.

    Args:
        spacing: mm per axis.
        largest: whether each class keeps its largest part alone (of equal ones the first).
        smallest: volume of the smallest part that stays, mm³ (mm² in 2D).
    """
    if not largest and not smallest:
        return mask
    kept = mask.clone()
    for k in mask.unique().tolist():  # type: ignore[no-untyped-call]
        parts, n = components(mask == k) if k else (np.zeros(0), 0)
        if not n:
            continue
        sizes = np.bincount(parts.ravel(), minlength=n + 1)[1:] * math.prod(spacing)
        stays = sizes >= smallest
        if largest:
            stays &= np.arange(n) == sizes.argmax()
        gone = np.concatenate([[False], ~stays])[parts]
        kept[torch.from_numpy(gone).to(kept.device)] = 0
    return kept
