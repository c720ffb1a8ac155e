"""Losses per example. Plain torch: MONAI's own one-hot step (`to_onehot_y`) fails under `torch.func.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]
Weight = Annotated[float, Field(ge=0, le=1000)]
Weights = Annotated[tuple[Weight, ...], Field(min_length=2, max_length=256)] | None
Exponent = Annotated[float, Field(gt=0, le=10)]
Smoothing = Annotated[float, Field(gt=0, le=1)]

#: keeps roots and quotients finite
TINY = 1e-7


def cross_entropy(*, weights: Weights = None) -> Criterion:
    """Mean cross-entropy over an example's positions.

    `weights`: of the classes; the mean is then by weight, within the example, so that no example's loss
    depends on how frequent a class is in another.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        if weights is None:
            return _cross_entropy(logits, target)
        each = _of_classes(weights, logits)[target]
        missed = F.cross_entropy(logits, target, reduction="none")
        return (each * missed).flatten(1).sum(1) / each.flatten(1).sum(1).clamp_min(TINY)

    return loss


def balanced_cross_entropy() -> Criterion:
    """Mean over the classes an example has of the mean cross-entropy there (after Xie and Tu, 2015)."""

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        sure = logits.log_softmax(1)
        hard = _one_hot(sure, target)
        count = hard.flatten(2).sum(2)
        means = -(hard * sure).flatten(2).sum(2) / count.clamp_min(1)
        return means.sum(1) / (count > 0).sum(1)

    return loss


def focal(*, gamma: Exponent = 2.0, weights: Weights = None) -> Criterion:
    """Focal loss (Lin et al., 2017, arXiv:1708.02002, equation 5): what is sure already counts less.

    `weights`: of the classes, the equation's alpha.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        sure = -F.cross_entropy(logits, target, reduction="none")
        missed = -((1 - sure.exp()).clamp_min(TINY) ** gamma) * sure
        if weights is not None:
            missed = _of_classes(weights, logits)[target] * missed
        return missed.flatten(1).mean(1)

    return loss


def dice(*, smooth: Smoothing = 1e-5, background: bool = False) -> Criterion:
    """One minus soft Dice (Milletari et al., 3DV 2016; denominator of plain sums), mean over classes.

    Args:
        smooth: added above and below, so that a class absent from both costs nothing.
        background: whether class 0 counts.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        overlap, soft, hard = _amounts(logits, target, background)
        total = soft + hard
        return 1 - ((2 * overlap + smooth) / (total + smooth)).mean(1)

    return loss


def generalised_dice(*, smooth: Smoothing = 1e-5, background: bool = True) -> Criterion:
    """One minus Dice over all classes, each weighing one over its squared volume (Sudre et al., 2017).

    arXiv:1707.03237, equation 2, per example; a class that an example does not have weighs as much as its
    rarest one.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        overlap, soft, hard = _amounts(logits, target, background)
        weight = torch.where(hard > 0, hard.clamp_min(1) ** -2, 0)
        weight = torch.where(hard > 0, weight, weight.amax(1, keepdim=True))
        return 1 - (2 * (weight * overlap).sum(1) + smooth) / ((weight * (soft + hard)).sum(1) + smooth)

    return loss


def tversky(
    *,
    alpha: Weight = 0.3,
    beta: Weight = 0.7,
    gamma: Exponent = 1.0,
    smooth: Smoothing = 1e-5,
    background: bool = False,
) -> Criterion:
    """One minus the Tversky index (Salehi et al., 2017, arXiv:1706.05721), mean over classes.

    Args:
        alpha, beta: weights of false positives and of false negatives; both 0.5 is Dice.
        gamma: below 1, classes found already still count (focal Tversky, Abraham and Khan, 2019,
            arXiv:1810.07842, whose exponent is 3/4).
        smooth, background: as in `dice`.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        overlap, soft, hard = _amounts(logits, target, background)
        wrong = alpha * (soft - overlap) + beta * (hard - overlap)
        missed = wrong / (overlap + wrong + smooth)
        # without a floor the slope of a root at 0 is infinite
        return (missed if gamma == 1 else missed.clamp_min(TINY) ** gamma).mean(1)

    return loss


def focal_tversky(
    *, alpha: Weight = 0.3, beta: Weight = 0.7, gamma: Exponent = 0.75, smooth: Smoothing = 1e-5
) -> Criterion:
    """`tversky` raised to `gamma`."""
    return tversky(alpha=alpha, beta=beta, gamma=gamma, smooth=smooth)


def boundary(*, weight: Weight = 0.01, smooth: Smoothing = 1e-5) -> Criterion:
    """`generalised_dice`, plus how far predicted foreground lies outside (Kervadec et al., 2019).

    arXiv:1812.07032, equation 5: the mean over classes and positions of probability times signed distance to
    the true boundary, in voxels. Distances are those within the patch, and computed from it: they follow
    what augmentation did to the mask.
    """
    overlap = generalised_dice(smooth=smooth)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        soft = logits.softmax(1)
        distance = signed_distance(_one_hot(soft, target)[:, 1:])
        outside = (soft[:, 1:] * distance).flatten(1).mean(1)
        return overlap(logits, target) + weight * outside

    return loss


def signed_distance(hard: Tensor) -> Tensor:
    """Distance to the nearest voxel of the other kind, negative within: `B K H W[D]` to the same.

    Within, one voxel less, so that the boundary's own voxels are 0. 0 everywhere for a class that is absent,
    or is everywhere.
    """
    both = torch.stack((hard, 1 - hard))  # the squared distance to what is 1
    far = float(sum(side**2 for side in hard.shape[2:]))
    square = torch.where(both > 0, 0.0, 4 * far)
    for axis in range(3, square.ndim):
        # along one axis after the other: the lower envelope of parabolas (Felzenszwalb, Huttenlocher, 2012)
        places = torch.arange(square.shape[axis], device=hard.device, dtype=square.dtype)
        shape = [-1 if axis == n else 1 for n in range(square.ndim)]
        best = square
        for place in range(square.shape[axis]):
            steps = ((places - place) ** 2).view(shape)
            best = torch.minimum(best, square.narrow(axis, place, 1) + steps)
        square = best
    outside, inside = square.sqrt()
    found = torch.where(hard > 0, 1 - inside, outside)
    there = (square < 4 * far).all(0)
    return torch.where(there, found, 0.0)


def lovasz() -> Criterion:
    """Lovasz-Softmax (Berman et al., 2018, arXiv:1705.08790, equation 11), which extends the Jaccard index.

    Mean over the classes that the example has.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        soft = logits.softmax(1)
        hard = _one_hot(soft, target).flatten(2)
        errors, order = (hard - soft.flatten(2)).abs().sort(2, descending=True)
        sorted_ = hard.gather(2, order)
        total = sorted_.sum(2, keepdim=True)
        jaccard = 1 - (total - sorted_.cumsum(2)) / (total + (1 - sorted_).cumsum(2))
        slope = torch.cat((jaccard[..., :1], jaccard.diff(dim=2)), 2)
        there = total.squeeze(2) > 0
        return ((errors * slope).sum(2) * there).sum(1) / there.sum(1)

    return loss


def dice_ce(
    *, smooth: Smoothing = 1e-5, background: bool = False, dice_weight: Weight = 1.0, ce_weight: Weight = 1.0
) -> Criterion:
    """Weighted sum of `dice` and `cross_entropy` (the loss of nnU-Net, Isensee et al. 2021)."""
    return _sum((dice_weight, dice(smooth=smooth, background=background)), (ce_weight, _cross_entropy))


def dice_focal(
    *,
    smooth: Smoothing = 1e-5,
    background: bool = False,
    gamma: Exponent = 2.0,
    dice_weight: Weight = 1.0,
    focal_weight: Weight = 1.0,
) -> Criterion:
    """Weighted sum of `dice` and `focal`."""
    return _sum((dice_weight, dice(smooth=smooth, background=background)), (focal_weight, focal(gamma=gamma)))


def _sum(first: tuple[float, Criterion], second: tuple[float, Criterion]) -> Criterion:
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return first[0] * first[1](logits, target) + second[0] * second[1](logits, target)

    return loss


def _one_hot(like: Tensor, target: Tensor) -> Tensor:
    """`B K H W[D]` as `like`. By comparison: F.one_hot looks at the values, which vmap forbids."""
    classes = target.new_tensor(range(like.shape[1])).view(1, -1, *[1] * (target.ndim - 1))
    return (target.unsqueeze(1) == classes).to(like.dtype)


def _amounts(logits: Tensor, target: Tensor, background: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Per class: soft overlap, what is predicted, what is there: `B K` each."""
    soft = logits.softmax(1)
    hard = _one_hot(soft, target)
    if not background:
        soft, hard = soft[:, 1:], hard[:, 1:]
    return (soft * hard).flatten(2).sum(2), soft.flatten(2).sum(2), hard.flatten(2).sum(2)


def _of_classes(weights: tuple[float, ...], logits: Tensor) -> Tensor:
    if len(weights) != logits.shape[1]:
        raise ValueError(f"loss.weights has {len(weights)} numbers; there are {logits.shape[1]} classes")
    return logits.new_tensor(weights)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none").flatten(1).mean(1)
