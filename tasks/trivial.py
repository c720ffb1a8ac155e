"""Predictors of a mask that need hardly any learning: what a network has to beat.

Each is additive: float64 sums over cases, which add over sites, then a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from skimage.filters import threshold_otsu
from torch import Tensor

from tasks.base import Case, Prediction, Summed, Sums
from tasks.data.resample import hardest, resample

#: cells of `Threshold`, evenly over normalised intensities from -SPAN to SPAN
CELLS, SPAN = 512, 4.0


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

    def cells(self, part: Sums) -> Tensor:
        """A class that few have tells of those few."""
        return (part["shares"] > 0).double()

    def predict(self, known: Sums, case: Case) -> Prediction:
        """That class on the case's whole grid."""
        shape = next(iter(case.images.values())).shape[1:]
        label = 1 + int(known["shares"][1:].argmax())
        return Prediction(masks={self.mask: torch.full(tuple(shape), label, dtype=torch.uint8)})


@dataclass(frozen=True)
class Atlas(Summed):
    """The mean training mask: one-hot masks stretched onto a common grid, averaged, stretched back.

    A class is averaged over the cases in which somebody looked for it; what is left is background.
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
        """One-hot masks on the common grid, and how many: `{"mask": K x side x …, "cases": K}`."""
        shape = (self.classes, *(self.side,) * self.dimensions)
        return {
            "mask": torch.zeros(shape, dtype=torch.float64),
            "cases": torch.zeros(self.classes, dtype=torch.float64),
        }

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """The case's mask on the common grid."""
        if self.mask not in case.masks:
            return self.zero()
        total = self.zero()
        shape = total["mask"].shape[1:]
        for k in range(self.classes):
            if not k or case.annotates is None or k in case.annotates:
                total["mask"][k] = resample((case.masks[self.mask] == k).float()[None], shape)[0].double()
                total["cases"][k] = 1
        return total

    def cells(self, part: Sums) -> Tensor:
        """A class that few have is the map of those few, however many were looked at."""
        return part["mask"].flatten(1).any(1).double()

    def predict(self, known: Sums, case: Case) -> Prediction:
        """The likeliest class at each position."""
        shape = next(iter(case.images.values())).shape[1:]
        count = known["cases"].clamp_min(1).view(-1, *[1] * self.dimensions)
        mean = (known["mask"] / count).float()
        mean[0] = 1 - mean[1:].sum(0)
        return Prediction(masks={self.mask: hardest(mean, shape)})


@dataclass(frozen=True)
class Threshold(Summed):
    """All that is darker, or all that is brighter, than one threshold for every case: the best in training.

    Best by the Dice of each training case at each of `CELLS` thresholds, which adds up.

    Attributes:
        mask: which mask; class 1 is sought. grey: a case's normalised intensities, `HW[D]`.
    """

    mask: str
    grey: Callable[[Case], Tensor]

    def zero(self) -> Sums:
        """Dice of what is darker, and of what is brighter, summed over cases: `{"dice": 2 x CELLS}`."""
        return {"dice": torch.zeros(2, CELLS, dtype=torch.float64)}

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """Dice at every threshold, from the case's histograms inside and outside of the mask."""
        if self.mask not in case.masks:
            return self.zero()
        inside = case.masks[self.mask] == 1
        cells = self._cells(case)
        sought, others = (
            torch.bincount(cells[part], minlength=CELLS).cumsum(0) for part in (inside, ~inside)
        )
        size = sought[-1].clamp_min(1)  # without the class every Dice is zero
        darker = 2 * sought / (sought + others + size)
        hit, wrong = sought[-1] - sought, others[-1] - others
        return {"dice": torch.stack([darker, 2 * hit / (hit + wrong + size)]).double()}

    def predict(self, known: Sums, case: Case) -> Prediction:
        """What lies on that side of that threshold."""
        brighter, cell = divmod(int(known["dice"].argmax()), CELLS)
        above = self._cells(case) > cell
        return Prediction(masks={self.mask: (above if brighter else ~above).to(torch.uint8)})

    def _cells(self, case: Case) -> Tensor:
        return ((self.grey(case) + SPAN) * (CELLS / (2 * SPAN))).long().clamp(0, CELLS - 1)


@dataclass(frozen=True)
class Otsu(Summed):
    """Each image's own threshold (Otsu 1979, IEEE Trans. SMC 9, 62-66), and which side of it is meant.

    Attributes:
        mask: which mask; class 1 is sought. grey: a case's raw intensities, `HW[D]`.
    """

    mask: str
    grey: Callable[[Case], Tensor]

    def zero(self) -> Sums:
        """Dice of the darker, the brighter and the smaller side, summed over cases: `{"dice": 3}`."""
        return {"dice": torch.zeros(3, dtype=torch.float64)}

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """Dice of the three."""
        if self.mask not in case.masks:
            return self.zero()
        sought = case.masks[self.mask] == 1
        shared = [
            2 * (side & sought).sum() / (side.sum() + sought.sum()).clamp_min(1) for side in self._sides(case)
        ]
        return {"dice": torch.stack(shared).double()}

    def predict(self, known: Sums, case: Case) -> Prediction:
        """The side that was best in training."""
        side = self._sides(case)[int(known["dice"].argmax())]
        return Prediction(masks={self.mask: side.to(torch.uint8)})

    def _sides(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        grey = self.grey(case)
        above = grey > float(threshold_otsu(grey.numpy()))  # type: ignore[no-untyped-call]
        return ~above, above, above if 2 * int(above.sum()) < above.numel() else ~above
