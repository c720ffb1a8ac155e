"""Additive sufficient statistics: sums travel, ratios do not.

Law: `a + b` is a commutative monoid, `to_vector` commutes with it, `value` comes last. So a metric
of pooled data equals the metric of merged sites, and statistics pass through a secure sum or noise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Statistics(ABC):
    """A record of float64 tensors that add field by field."""

    def __add__(self, other: Self) -> Self:
        if type(other) is not type(self):
            return NotImplemented
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def to_vector(self) -> Tensor:
        """All fields, flattened in order: float64 of fixed length."""
        return torch.cat([getattr(self, f.name).double().reshape(-1) for f in fields(self)])

    def from_vector(self, vector: Tensor) -> Self:
        """The statistics of this kind and these shapes that `vector` holds.

        Raises:
            ValueError: wrong length.
        """
        sizes = [getattr(self, f.name).numel() for f in fields(self)]
        if vector.shape != (sum(sizes),):
            raise ValueError(f"statistics vector has shape {tuple(vector.shape)}; need ({sum(sizes)},)")
        parts = vector.double().split(sizes)
        return type(self)(
            *(part.reshape(getattr(self, f.name).shape) for part, f in zip(parts, fields(self), strict=True))
        )

    @abstractmethod
    def value(self) -> dict[str, float]:
        """Flat metrics (`dice_mean`, `dice_1`, …), with `<metric>_lo`, `<metric>_hi` where there is an interval."""

    @property
    @abstractmethod
    def patients(self) -> int:
        """How many patients stand behind it."""
