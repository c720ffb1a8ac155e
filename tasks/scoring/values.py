"""Statistics of predicted numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from tasks.metrics import Z95
from tasks.scoring.vector import VectorStatistics, averaged, mean_of, zeros

#: what `ValueStatistics.moments` sums
_MOMENTS = 9


@dataclass(frozen=True)
class ValueStatistics(VectorStatistics):
    """K numbers.

    Attributes:
        having: K, patients in whom each is known.
        moments: `K x 9`, sums of 1, t, g, t², g², t g, |g - t|, (g - t)², (g - t)⁴; truth t, given g.
    """

    having: Tensor
    moments: Tensor

    @property
    def columns(self) -> tuple[str, ...]:
        """`patient`, `truth_0`, …, `given_0`, …"""
        targets = range(len(self.having))
        return ("patient", *(f"truth_{k}" for k in targets), *(f"given_{k}" for k in targets))

    @classmethod
    def zero(cls, k: int) -> Self:
        """No patient, for `k` targets."""
        return cls(count=zeros(), having=zeros(k), moments=zeros(k, _MOMENTS), rows=zeros(0, 1 + 2 * k))

    @staticmethod
    def _check(truth: Tensor, given: Tensor, k: int) -> None:
        """Any number will do."""

    def _of_rows(self, truth: Tensor, given: Tensor) -> dict[str, Any]:
        known = ~truth.isnan()
        t, g = truth.nan_to_num(0), torch.where(known, given, 0)
        off = g - t
        terms = [known.double(), t, g, t**2, g**2, t * g, off.abs(), off**2, off**4]
        return {"having": known.any(0).double(), "moments": torch.stack([term.sum(0) for term in terms], 1)}

    def cells(self) -> Tensor:
        """Patients, and patients in whom each number is known."""
        return torch.cat([self.count[None], self.having])

    def names(self) -> frozenset[str]:
        """What `value` may tell."""
        # four patients whose numbers are not all equal
        moments = torch.tensor([4.0, 4, 4, 8, 8, 6, 1, 1, 1], dtype=torch.float64)
        return frozenset(replace(self, moments=moments.expand_as(self.moments)).value())

    def value(self) -> dict[str, float]:
        """`mae`, `rmse`, `r2`, `correlation` (Pearson's, interval by Fisher's z); with more than one target
        each per target too, and these are means.
        """
        parts = {k: _regression(moments) for k, moments in enumerate(self.moments)}
        return parts[0] if len(parts) == 1 else averaged(parts)


def _regression(moments: Tensor) -> dict[str, float]:
    n, t, g, tt, gg, tg, _, square, _ = (float(m) for m in moments)
    if n < 1:
        return {}
    found = mean_of("mae", moments[6], moments[7], n)
    root = mean_of("rmse", moments[7], moments[8], n)
    found |= {name: value**0.5 for name, value in root.items() if value >= 0}
    spread, given = tt - t * t / n, gg - g * g / n
    # of numbers that are all equal nothing is explained; their rounding errors are not a spread
    if spread > 1e-12 * tt:
        found["r2"] = 1 - square / spread
        if given > 1e-12 * gg:
            r = max(-1.0, min(1.0, (tg - t * g / n) / (spread * given) ** 0.5))
            found["correlation"] = r
            if n > 3 and abs(r) < 1:
                z, half = math.atanh(r), Z95 / (n - 3) ** 0.5
                found |= {"correlation_lo": math.tanh(z - half), "correlation_hi": math.tanh(z + half)}
    return found
