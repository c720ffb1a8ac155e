"""How true a made image is, in sums over patients; and the makers that need hardly any learning."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from tasks.base import Case, Prediction, Summed, Sums
from tasks.metrics import Statistics, interval
from tasks.synthesis import ssim

Pair = Callable[[Case], tuple[Tensor, Tensor | None]]
_NAMES = ("psnr", "mae", "ssim")
#: of the ratio, in dB: that of two equal images has no end
_BEST = 100.0


@dataclass(frozen=True)
class FidelityStatistics(Statistics):
    """Sums over patients, float64.

    Attributes:
        count: scalar, patients. total, squares: 3, of each patient's signal-to-noise ratio in dB, absolute
            error in raw units and similarity.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    @classmethod
    def zero(cls) -> Self:
        """No patient."""
        each = torch.zeros(3, dtype=torch.float64)
        return cls(each.new_zeros(()), each, each)

    @classmethod
    def of_patient(cls, pairs: Sequence[tuple[Tensor, Tensor]], bounds: tuple[float, float]) -> Self:
        """One patient's: the mean over its images.

        Args:
            pairs: target and what was made, `C H W[D]` in raw units. bounds: both are cut to them; their
                distance is the peak of the ratio.
        """
        low, high = bounds
        found = []
        for target, made in pairs:
            a, b = target.double().clamp(low, high), made.double().clamp(low, high)
            error = float(((a - b) ** 2).mean())
            ratio = 10 * math.log10((high - low) ** 2 / error) if error else _BEST
            scaled = [((x - low) / (high - low) * 2 - 1).float()[None] for x in (a, b)]
            # a thin volume has no room for the window of three axes: its slices are compared
            flat = [x if x.ndim == 4 else x[0].movedim(-1, 0) for x in scaled]
            found.append([min(ratio, _BEST), float((a - b).abs().mean()), float(ssim(*flat).mean())])
        mean = torch.tensor(found, dtype=torch.float64).mean(0)
        return cls(torch.ones((), dtype=torch.float64), mean, mean**2)

    @property
    def patients(self) -> int:
        """How many patients were scored."""
        return round(float(self.count))

    def value(self) -> dict[str, float]:
        """`psnr` (dB), `mae` (raw units), `ssim`: means over patients; `_lo`, `_hi` from two patients on."""
        n = float(self.count)
        if not n:
            return {}
        found = {name: float(t) / n for name, t in zip(_NAMES, self.total, strict=True)}
        for name, total, squares in zip(_NAMES, self.total, self.squares, strict=True):
            if n >= 2:
                half = interval(float(total), float(squares), n)
                found |= {f"{name}_lo": found[name] - half, f"{name}_hi": found[name] + half}
        return found


@dataclass(frozen=True)
class Identity(Summed):
    """What is given, as it is."""

    target: str
    pair: Pair

    def zero(self) -> Sums:
        """Nothing is learned; one sum, so that there is an answer: how many cases."""
        return {"cases": torch.zeros((), dtype=torch.float64)}

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """One."""
        return {"cases": torch.ones((), dtype=torch.float64)}

    def predict(self, known: Sums, case: Case) -> Prediction:
        """The given image."""
        return Prediction(images={self.target: self.pair(case)[0]})


@dataclass(frozen=True)
class Affine(Summed):
    """The line through all intensities that fits best: least squares by sums."""

    target: str
    pair: Pair
    bounds: tuple[float, float]

    def zero(self) -> Sums:
        """Means over a case of x, y, x², xy (intensities of both images, scaled), and how many cases."""
        return {"moments": torch.zeros(4, dtype=torch.float64), "cases": torch.zeros((), dtype=torch.float64)}

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """The case's."""
        given, wanted = self.pair(case)
        if wanted is None:
            return self.zero()
        x, y = self._scaled(given), self._scaled(wanted)
        moments = torch.stack([x.mean(), y.mean(), (x * x).mean(), (x * y).mean()])
        return {"moments": moments, "cases": torch.ones((), dtype=torch.float64)}

    def _scaled(self, image: Tensor) -> Tensor:
        low, high = self.bounds
        return (image.double().clamp(low, high) - low) / (high - low)

    def predict(self, known: Sums, case: Case) -> Prediction:
        """The given image on the line."""
        low, high = self.bounds
        x, y, xx, xy = (known["moments"] / known["cases"].clamp_min(1)).tolist()
        slope = (xy - x * y) / max(xx - x * x, 1e-12)
        made = slope * (self._scaled(self.pair(case)[0]) - x) + y
        return Prediction(images={self.target: (made * (high - low) + low).float()})
