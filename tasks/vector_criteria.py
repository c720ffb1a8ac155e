"""Losses per example for networks of shape `vector`. A weight depends on an example's own target alone."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from tasks.criteria import Criterion

Positive = Annotated[float, Field(gt=0, le=1e6)]
Weights = Annotated[tuple[Positive, ...], Field(min_length=1, max_length=4096)]
Smoothing = Annotated[float, Field(ge=0, lt=1)]


def class_cross_entropy(*, weights: Weights | None = None, smoothing: Smoothing = 0.0) -> Criterion:
    """Cross-entropy `sum_k w_k t_k (-log p_k)`.

    Args:
        weights: of the classes; none: 1 each. They are not divided by their sum over the batch, as torch's
            mean does: that would couple its examples.
        smoothing: share of each target that is spread evenly over all classes (Szegedy et al., 2016).
    """

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(
            logits,
            target,
            _constants("weights", weights, logits),
            reduction="none",
            label_smoothing=smoothing,
        )

    return loss


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
