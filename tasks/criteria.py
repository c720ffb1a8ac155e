"""Losses per example. Plain torch: MONAI's own one-hot step (`to_onehot_y`) fails under `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]
Weight = Annotated[float, Field(ge=0, le=1000)]
Smoothing = Annotated[float, Field(gt=0, le=1)]


def cross_entropy() -> Criterion:
    """Mean cross-entropy over an example's positions."""
    return _cross_entropy


def dice(*, smooth: Smoothing = 1e-5, background: bool = False) -> Criterion:
    """One minus soft Dice (Milletari et al., 3DV 2016; denominator of plain sums), mean over classes.

    Args:
        smooth: added above and below, so that a class absent from both costs nothing.
        background: whether class 0 counts.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        soft = logits.softmax(1)
        # one-hot by comparison: F.one_hot looks at the values, which vmap forbids
        classes = target.new_tensor(range(logits.shape[1])).view(1, -1, *[1] * (target.ndim - 1))
        hard = (target.unsqueeze(1) == classes).to(soft.dtype)
        if not background:
            soft, hard = soft[:, 1:], hard[:, 1:]
        overlap = (soft * hard).flatten(2).sum(2)
        total = soft.flatten(2).sum(2) + hard.flatten(2).sum(2)
        return 1 - ((2 * overlap + smooth) / (total + smooth)).mean(1)

    return loss


def dice_ce(
    *, smooth: Smoothing = 1e-5, background: bool = False, dice_weight: Weight = 1.0, ce_weight: Weight = 1.0
) -> Criterion:
    """Weighted sum of `dice` and `cross_entropy` (the loss of nnU-Net, Isensee et al. 2021)."""
    overlap = dice(smooth=smooth, background=background)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return dice_weight * overlap(logits, target) + ce_weight * _cross_entropy(logits, target)

    return loss


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none").flatten(1).mean(1)
