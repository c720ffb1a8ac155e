"""Predictors of a mask that need hardly any learning: what a network has to beat.

Each is additive: float64 sums over cases, which add over sites, then a rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tasks.base import Case, Prediction, Summed, Sums
from tasks.data.resample import hardest, resample


@dataclass(frozen=True)
class Constant(Summed):
    """Every voxel is the foreground class that fills most of the training cases.

    Attributes:
        mask: which mask. classes: how many, with the background.
    """

    mask: str
    classes: int

    def zero(self) -> Sums:
        """Share of each class, summed over cases: `{"shares": K}`."""
        return {"shares": torch.zeros(self.classes, dtype=torch.float64)}

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """The share of each class in the case's voxels (not their count, so that sums stay small)."""
        if self.mask not in case.masks:
            return self.zero()
        voxels = torch.bincount(case.masks[self.mask].flatten().long(), minlength=self.classes).double()
        return {"shares": voxels / voxels.sum()}

    def predict(self, known: Sums, case: Case) -> Prediction:
        """That class on the case's whole grid."""
        shape = next(iter(case.images.values())).shape[1:]
        label = 1 + int(known["shares"][1:].argmax())
        return Prediction(masks={self.mask: torch.full(tuple(shape), label, dtype=torch.uint8)})


@dataclass(frozen=True)
class Atlas(Summed):
    """The mean training mask: one-hot masks stretched onto a common grid, averaged, stretched back.

    Positions correspond in proportion to the image's sides, so nothing is registered.

    Attributes:
        mask: which mask. classes: how many, with the background. dimensions: 2 or 3.
        side: of the common grid, the same for every axis.
    """

    mask: str
    classes: int
    dimensions: int
    side: int

    def zero(self) -> Sums:
        """One-hot masks on the common grid, and how many: `{"mask": K x side x …, "cases": ()}`."""
        shape = (self.classes, *(self.side,) * self.dimensions)
        return {
            "mask": torch.zeros(shape, dtype=torch.float64),
            "cases": torch.zeros((), dtype=torch.float64),
        }

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """The case's mask on the common grid."""
        if self.mask not in case.masks:
            return self.zero()
        total = self.zero()["mask"]
        shape = total.shape[1:]
        for k in range(self.classes):
            total[k] = resample((case.masks[self.mask] == k).float()[None], shape)[0].double()
        return {"mask": total, "cases": torch.ones((), dtype=torch.float64)}

    def predict(self, known: Sums, case: Case) -> Prediction:
        """The likeliest class at each position."""
        shape = next(iter(case.images.values())).shape[1:]
        mean = (known["mask"] / known["cases"].clamp_min(1)).float()
        return Prediction(masks={self.mask: hardest(mean, shape)})
