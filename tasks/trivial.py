"""Predictors of a mask that need hardly any learning: what a network has to beat.

Each is additive: float64 sums over cases, which add over sites, then a rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tasks.base import Case, Prediction, Sums
from tasks.data.resample import hardest, resample


@dataclass(frozen=True)
class Constant:
    """Every voxel is the foreground class that is most frequent in training.

    Attributes:
        mask: which mask. classes: how many, with the background.
    """

    mask: str
    classes: int

    def zero(self) -> Sums:
        """Voxels per class: `{"voxels": K}`."""
        return {"voxels": torch.zeros(self.classes, dtype=torch.float64)}

    def accumulate(self, case: Case) -> Sums:
        """The case's voxels per class."""
        voxels = self.zero()["voxels"]
        if self.mask in case.masks:
            voxels += torch.bincount(case.masks[self.mask].flatten().long(), minlength=self.classes).double()
        return {"voxels": voxels}

    def predict(self, sums: Sums, case: Case) -> Prediction:
        """That class on the case's whole grid."""
        shape = next(iter(case.images.values())).shape[1:]
        label = 1 + int(sums["voxels"][1:].argmax())
        return Prediction(masks={self.mask: torch.full(tuple(shape), label, dtype=torch.uint8)})


@dataclass(frozen=True)
class Atlas:
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

    def accumulate(self, case: Case) -> Sums:
        """The case's mask on the common grid."""
        total = self.zero()["mask"]
        shape = total.shape[1:]
        if self.mask not in case.masks:
            return self.zero()
        for k in range(self.classes):
            total[k] = resample((case.masks[self.mask] == k).float()[None], shape)[0].double()
        return {"mask": total, "cases": torch.ones((), dtype=torch.float64)}

    def predict(self, sums: Sums, case: Case) -> Prediction:
        """The likeliest class at each position."""
        shape = next(iter(case.images.values())).shape[1:]
        mean = (sums["mask"] / sums["cases"].clamp_min(1)).float()
        return Prediction(masks={self.mask: hardest(mean, shape)})
