"""Losses per example for networks of shape `vector`. A weight depends on an example's own target alone.

Where a target may be missing (NaN), an example's loss is the mean over what it has: the number of labels
that somebody else has does not matter, and an example without any costs nothing.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tasks.criteria import Criterion

Positive = Annotated[float, Field(gt=0, le=1e6)]
Weights = Annotated[tuple[Positive, ...], Field(min_length=1, max_length=4096)]
Smoothing = Annotated[float, Field(ge=0, lt=1)]
#: below it the slope of a power under 1 would be infinite
_TINY = 1e-12
Exponent = Annotated[float, Field(ge=0, le=10)]


# ---- one class of K


def class_cross_entropy(*, weights: Weights | None = None, smoothing: Smoothing = 0.0) -> Criterion:
    """Cross-entropy `sum_k w_k t_k (-log p_k)`.

    Args:
        weights: of the classes; none: 1 each. They are not divided by their sum over the batch, as torch's
            mean does: that would couple its examples.
        smoothing: share of each target that is spread evenly over all classes (Szegedy et al., 2016,
            arXiv:1512.00567).
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        known = _constants("weights", weights, logits)
        return F.cross_entropy(logits, target, known, reduction="none", label_smoothing=smoothing)

    return loss


def class_focal(*, gamma: Exponent = 2.0, weights: Weights | None = None) -> Criterion:
    """Focal loss `sum_k w_k t_k (1 - p_k)^gamma (-log p_k)` (Lin et al., 2017, arXiv:1708.02002, equation 5).

    Args:
        gamma: how much less an example counts that is already right; 0 is cross-entropy.
        weights: of the classes; none: 1 each.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        known = _constants("weights", weights, logits)
        sure = logits.log_softmax(1)
        parts = -_shares(target, logits) * (1 - sure.exp()).clamp(min=_TINY) ** gamma * sure
        return (parts if known is None else parts * known).sum(1)

    return loss


def logit_adjusted(*, priors: Weights, tau: Exponent = 1.0) -> Criterion:
    """Cross-entropy of `logits + tau log(priors)` (Menon et al., 2021, arXiv:2007.07314, equation 10).

    What the network itself gives is then right for classes that are equally frequent.

    Args:
        priors: shares or counts of the classes; public numbers of the plan, not counted at a site.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        known = _constants("priors", priors, logits)
        shift = 0 if known is None else tau * (known / known.sum()).log()
        return F.cross_entropy(logits + shift, target, reduction="none")

    return loss


# ---- K findings, each there or not


def multilabel_bce(*, positive: Weights | None = None) -> Criterion:
    """Binary cross-entropy, mean over the labels that an example has.

    Args:
        positive: what a finding that is there counts, one number per label; none: 1 each.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        known = _constants("positive", positive, logits)
        parts = F.binary_cross_entropy_with_logits(
            logits, target.nan_to_num(), pos_weight=known, reduction="none"
        )
        return _over_present(parts, target)

    return loss


def multilabel_focal(*, gamma: Exponent = 2.0, positive: Weights | None = None) -> Criterion:
    """Focal loss of each label on its own (Lin et al., 2017, arXiv:1708.02002), mean over those present.

    Args:
        gamma, positive: as for `class_focal` and `multilabel_bce`.
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        known = _constants("positive", positive, logits)
        truth = target.nan_to_num()
        parts = F.binary_cross_entropy_with_logits(logits, truth, pos_weight=known, reduction="none")
        wrong = (truth - logits.sigmoid()).abs().clamp(min=_TINY)
        return _over_present(wrong**gamma * parts, target)

    return loss


# ---- levels in an order


def ordinal() -> Criterion:
    """Mean binary cross-entropy of "above level j", j from 0 to K-2 (Niu et al., CVPR 2016).

    With a head whose thresholds share their weights it is CORAL (Cao et al., 2020, arXiv:1901.07884).
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        levels = torch.arange(logits.shape[1], device=logits.device)
        above = (target.unsqueeze(1) > levels).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, above, reduction="none").mean(1)

    return loss


# ---- numbers


def squared_error() -> Criterion:
    """Mean squared error of the values that an example has."""
    return lambda output, target: _over_present((output - target.nan_to_num()).square(), target)


def absolute_error() -> Criterion:
    """Mean absolute error of the values that an example has."""
    return lambda output, target: _over_present((output - target.nan_to_num()).abs(), target)


def huber(*, delta: Positive = 1.0) -> Criterion:
    """Half the squared error up to `delta`, straight beyond (Huber, 1964); mean over the values present."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return _over_present(F.huber_loss(output, target.nan_to_num(), reduction="none", delta=delta), target)

    return loss


def _shares(target: Tensor, logits: Tensor) -> Tensor:
    """`B` classes or `B K` shares of them as `B K` shares."""
    if target.is_floating_point():
        return target
    # one-hot by comparison: F.one_hot looks at the values, which vmap forbids
    classes = torch.arange(logits.shape[1], device=target.device)
    return (target.unsqueeze(1) == classes).to(logits.dtype)


def _over_present(parts: Tensor, target: Tensor) -> Tensor:
    """Mean of `parts` (`B K`) where `target` (`B K`) is no NaN; 0 where there is none."""
    there = ~target.isnan()
    return (parts * there).sum(1) / there.sum(1).clamp(min=1)


def _constants(name: str, values: tuple[float, ...] | None, logits: Tensor) -> Tensor | None:
    """One number per output, as a tensor beside `logits` (`B K`).

    Raises:
        ValueError: there are not K of them.
    """
    if values is None:
        return None
    if len(values) != logits.shape[1]:
        raise ValueError(f"loss.{name} has {len(values)} numbers; the model has {logits.shape[1]} outputs")
    return logits.new_tensor(values)
