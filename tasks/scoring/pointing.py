"""The pointing game beside other statistics: does a map have its maximum where it should?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from tasks.metrics import Statistics


@dataclass(frozen=True)
class Pointed(Statistics):
    """Statistics, and hits of the pointing game by predicted class (Zhang et al., 2016, arXiv:1608.00507).

    A patient's cases with a mask count 1 together. No margin around the mask counts as a hit.

    Attributes:
        kind: the zero of the other statistics. whole: their sums; `rows` are theirs.
        hits, tried: K, by predicted class.
    """

    kind: Statistics
    whole: Tensor
    hits: Tensor
    tried: Tensor

    @property
    def columns(self) -> tuple[str, ...]:
        """The others'."""
        return self.kind.columns

    @property
    def patients(self) -> int:
        """Of the others."""
        return self._others.patients

    @property
    def _others(self) -> Statistics:
        return replace(self.kind.from_vector(self.whole), rows=self.rows)

    def cells(self) -> Tensor:
        """The others'."""
        return self._others.cells()

    def guarded(self, minimum: int) -> Self:
        """Without the classes behind which too few patients stand; their share of the mean goes too."""
        enough = (self.tried >= minimum).double()
        return replace(self, hits=self.hits * enough, tried=self.tried * enough)

    def bounds(self) -> dict[str, float]:
        """None: where maps point is scored without noise only."""
        raise ValueError("task.cam is scored without noise only")

    def value(self) -> dict[str, float]:
        """The others', `pointing_<k>` of the cases said to be k, and `pointing` of all."""
        found = self._others.value()
        for k, (hits, tried) in enumerate(zip(self.hits.tolist(), self.tried.tolist(), strict=True)):
            if tried:
                found[f"pointing_{k}"] = hits / tried
        if total := float(self.tried.sum()):
            found["pointing"] = float(self.hits.sum()) / total
        return found


def points(found: Tensor, mask: Tensor) -> bool:
    """Whether the map `HW[D]` has its maximum, above 0, in the mask."""
    return bool(found.max() > 0) and bool(mask.flatten()[found.argmax()])


def pointed(others: Statistics, classes: int, hits: Sequence[tuple[int, bool]]) -> Pointed:
    """A patient's statistics (or a zero) with the game's.

    Args:
        hits: of each case with a mask, the class it is said to be of, and whether its map is right.
    """
    tried = torch.zeros(2, classes, dtype=torch.float64)
    for k, hit in hits:
        tried[:, k] += torch.tensor([float(hit), 1.0], dtype=torch.float64) / len(hits)
    sums = others.alone().to_vector()
    kind = others.alone().from_vector(torch.zeros_like(sums))
    return Pointed(kind=kind, whole=sums, hits=tried[0], tried=tried[1], rows=others.rows)
