"""Additive sufficient statistics: sums travel, ratios do not.

Law: `a + b` is a commutative monoid, `to_vector` commutes with it, `value` comes last. So a metric
of pooled data equals the metric of merged sites, and statistics pass through a secure sum or noise.
In simulation each patient's own numbers may go along (`rows`), for exact ranks and paired comparison.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

MISSING = -(2.0**90)
"""Stands for NaN in a vector, which holds finite numbers only."""


def _no_rows() -> Tensor:
    return torch.zeros(0, 0, dtype=torch.float64)


@dataclass(frozen=True)
class Statistics(ABC):
    """A record of float64 tensors that add field by field (a field of another type is a setting).

    Attributes:
        rows: `N x W` float64, the patients one by one, in no order: `columns` names the values, the first is
            the patient's `code`, NaN is a missing one. They are appended where sums are added, and come
            last in a vector. Only simulated sites tell them.
    """

    rows: Tensor = field(default_factory=_no_rows, kw_only=True)

    @property
    def columns(self) -> tuple[str, ...]:
        """What a row holds; none where this kind keeps no rows."""
        return ()

    def sums(self) -> dict[str, Tensor]:
        """By name, in the order of the vector."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "rows"}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def __add__(self, other: Self) -> Self:
        if type(other) is not type(self):
            return NotImplemented
        sums: dict[str, Any] = {n: value + getattr(other, n) for n, value in self.sums().items()}
        return replace(self, **sums, rows=torch.cat([self.rows, other.rows]))

    def to_vector(self) -> Tensor:
        """All sums, flattened in order, then the rows: float64, without rows of fixed length."""
        rows = torch.where(self.rows.isnan(), MISSING, self.rows)
        return torch.cat([t.double().reshape(-1) for t in (*self.sums().values(), rows)])

    def from_vector(self, vector: Tensor) -> Self:
        """The statistics of this kind and these shapes that `vector` holds.

        Raises:
            ValueError: wrong length.
        """
        sums, width = self.sums(), self.rows.shape[1]
        size = sum(t.numel() for t in sums.values())
        rest = vector.numel() - size
        if vector.ndim != 1 or rest < 0 or rest % width if width else rest:
            more = f" and rows of {width}" if width else ""
            raise ValueError(f"statistics vector has shape {tuple(vector.shape)}; need ({size},){more}")
        *parts, tail = torch.split(vector.double(), [*(t.numel() for t in sums.values()), rest])
        made: dict[str, Any] = {n: p.reshape(t.shape) for p, (n, t) in zip(parts, sums.items(), strict=True)}
        rows = tail.reshape(-1, width) if width else self.rows
        return replace(self, **made, rows=torch.where(rows == MISSING, torch.nan, rows))

    def alone(self) -> Self:
        """The sums without the rows: all that a hospital tells."""
        return replace(self, rows=self.rows[:0])

    def cells(self) -> Tensor:
        """How many patients stand behind each mean or share in `value`; 0 where there is none."""
        return torch.tensor([float(self.patients)], dtype=torch.float64)

    @property
    def products(self) -> int:
        """How many features of patients they hold the products of, with each other."""
        return 0

    def guarded(self, minimum: int) -> Self:
        """Without what a site may leave out by itself because fewer patients stand behind it."""
        return self

    def names(self) -> frozenset[str]:
        """What `value` may tell: of sums that are all there."""
        return frozenset(self.from_vector(torch.full_like(self.alone().to_vector(), 2.0)).value())

    @abstractmethod
    def value(self) -> dict[str, float]:
        """Flat metrics (`dice_mean`, `dice_1`, …); `<metric>_lo` and `_hi` where there is an interval."""

    @property
    @abstractmethod
    def patients(self) -> int:
        """How many patients stand behind it."""

    def bounds(self) -> dict[str, float]:
        """For each field the largest L2 norm that one patient's can have; 0: it stays home under DP.

        Noise is in proportion to these, times the root of how many fields leave: leave out what can be done
        without (squares, which serve intervals), or has no bound.

        Raises:
            ValueError: they are not known, and so these statistics cannot be noised.
        """
        raise ValueError(f"{type(self).__name__} knows no bound of what one patient adds")


def code(patient: str) -> float:
    """A number for a patient's pseudonymous key, the same in every run: 52 bits of its SHA-256."""
    return float(int(hashlib.sha256(patient.encode()).hexdigest()[:13], 16))


#: normal quantile of a two-sided 95 % interval
Z95 = 1.959964


def interval(total: float, squares: float, n: float) -> float:
    """Half width of the normal 95 % interval of a mean, from the sums of values and squares; n >= 2."""
    variance = max(0.0, squares - total * total / n) / (n - 1)
    return Z95 * math.sqrt(variance / n)
