"""Aggregates that a hostile minority cannot drag away: the coordinate median."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from conf.table import STRICT
from strategies.base import Strategy, Study, Tensors
from strategies.exact import Collect, Collected, Folded
from strategies.protocol import Tree


def median(rows: Tensor) -> Tensor:
    """The median of each column; of an even number of rows, the mean of the middle two. `[n, P] -> [P]`."""
    # numpy sorts several times faster along a short axis, and makes no indices
    ordered = torch.from_numpy(np.sort(rows.numpy(), axis=0))
    n = len(rows)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


@dataclass(frozen=True)
class Median(Strategy):
    """Coordinate-wise median of the sites' changes, unweighted (Yin et al., 2018, arXiv:1803.01498)."""

    __pydantic_config__ = STRICT

    def fold(self) -> Collect:
        return Collect()

    def apply(self, folded: Folded, state: Tree, model: Tensors, study: Study) -> tuple[Tensors, Tree]:
        if not isinstance(folded, Collected):
            raise TypeError("the median needs a Collect")
        middle = folded.reduce("delta", median)
        return {n: torch.add(t, middle[n]) if n in middle else t for n, t in model.items()}, state
