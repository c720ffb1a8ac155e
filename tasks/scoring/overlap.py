"""How well masks agree, per patient: overlap, volume, and where asked for surfaces and lesions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from tasks.metrics import Statistics, code, interval
from tasks.scoring.surface import DISTANCES, Depth


@dataclass(frozen=True)
class SegmentationStatistics(Statistics):
    """Overlap per foreground class, summed over patients (a patient's value: the mean over its cases).

    A class that is empty in truth and prediction is left out for that patient and counted in `empty`.
    All float64; `K` foreground classes.

    Attributes:
        count: scalar, patients.
        present, empty: K, patients in whom the class counts, and in whom it does not.
        dice, dice_squared, iou: K, sums over the patients in `present`.
        volume, volume_absolute: K, sums of predicted minus true volume in ml (0 entries in 2D).
        some, mean, mean_squared: scalars, patients with any class present; sums of their mean Dice.
        measured: `M x K x 3`, of each further measure how many patients have it, sum and sum of squares.
        measures: their names.
    """

    count: Tensor
    present: Tensor
    empty: Tensor
    dice: Tensor
    dice_squared: Tensor
    iou: Tensor
    volume: Tensor
    volume_absolute: Tensor
    some: Tensor
    mean: Tensor
    mean_squared: Tensor
    measured: Tensor
    measures: tuple[str, ...]

    @classmethod
    def zero(cls, classes: int, dimensions: int, measures: tuple[str, ...] = ()) -> Self:
        """The zero for `classes` foreground classes."""
        per_class = torch.zeros(classes, dtype=torch.float64)
        volume = torch.zeros(classes if dimensions == 3 else 0, dtype=torch.float64)
        scalar = torch.zeros((), dtype=torch.float64)
        return cls(
            count=scalar,
            present=per_class,
            empty=per_class,
            dice=per_class,
            dice_squared=per_class,
            iou=per_class,
            volume=volume,
            volume_absolute=volume,
            some=scalar,
            mean=scalar,
            mean_squared=scalar,
            measured=torch.zeros(len(measures), classes, 3, dtype=torch.float64),
            measures=measures,
            rows=torch.zeros(0, 1 + classes * (1 + len(measures)), dtype=torch.float64),
        )

    @classmethod
    def of_patient(
        cls,
        patient: str,
        cases: Sequence[tuple[Tensor, Tensor, Sequence[float]]],
        classes: int,
        depth: Depth = Depth(),  # noqa: B008  frozen
    ) -> Self:
        """One patient's statistics.

        Args:
            patient: pseudonymous key.
            cases: truth and prediction (`HW[D]` of class indices) on one grid, and its spacing in mm.
            classes: foreground classes.
            depth: what is measured beside overlap.

        Raises:
            ValueError: truth and prediction differ in shape, or hold a class that is not there.
        """
        dimensions = len(cases[0][2]) if cases else 3
        zero = cls.zero(classes, dimensions, depth.names)
        if not cases:
            return zero
        rows = torch.stack([_overlap(truth, given, mm, classes) for truth, given, mm in cases])
        there = ~rows[..., 0].isnan()  # cases x K
        present = there.any(0).double()
        dice, iou, volume, absolute = (rows.nan_to_num(0).sum(0) / there.sum(0).clamp_min(1)[:, None]).unbind(
            1
        )
        some = present.amax()
        mean = dice.sum() / present.sum().clamp_min(1)
        further = _further(cases, classes, depth)  # M x K
        known = ~further.isnan()
        sums = torch.stack([known.double(), further.nan_to_num(0), further.nan_to_num(0) ** 2], 2)
        own = [torch.tensor([code(patient)], dtype=torch.float64), dice.where(present > 0, torch.nan)]
        return cls(
            count=torch.ones((), dtype=torch.float64),
            present=present,
            empty=1 - present,
            dice=dice,
            dice_squared=dice**2,
            iou=iou,
            volume=volume if dimensions == 3 else zero.volume,
            volume_absolute=absolute if dimensions == 3 else zero.volume,
            some=some,
            mean=mean,
            mean_squared=mean**2,
            measured=sums,
            measures=depth.names,
            rows=torch.cat([*own, further.flatten()])[None],
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """`patient`, `dice_1`, …, `<measure>_1`, …"""
        names = ("dice", *self.measures)
        return ("patient", *(f"{name}_{k + 1}" for name in names for k in range(len(self.present))))

    def cells(self) -> Tensor:
        """Patients, patients with each class, and those of whom a measure says something."""
        return torch.cat([self.count[None], self.present, self.measured[..., 0].flatten()])

    def guarded(self, minimum: int) -> Self:
        """Without the classes that too few patients have in truth or prediction: they count as empty.

        How many have one depends on the model, so a site cannot refuse for it. The mean over classes goes
        too, for the other classes would tell the missing one by it.
        """
        small = (self.present > 0) & (self.present < minimum)
        measured = self.measured.where((self.measured[..., :1] >= minimum) & ~small[:, None], 0.0)
        if not bool(small.any()):
            return replace(self, measured=measured)
        kept = {n: t.where(~small, 0.0) if t.shape == small.shape else t for n, t in self.sums().items()}
        none = torch.zeros_like(self.count)
        changed: dict[str, Any] = {**kept, "some": none, "mean": none, "mean_squared": none}
        changed |= {"empty": self.empty.where(~small, self.count), "measured": measured}
        return replace(self, **changed)

    @property
    def patients(self) -> int:
        """How many patients were scored."""
        return round(float(self.count))

    def bounds(self) -> dict[str, float]:
        """Counts and overlaps, between 0 and 1 for each class; no squares, and no volumes."""
        classes = math.sqrt(len(self.present))
        leave = {"count": 1.0, "present": classes, "dice": classes, "iou": classes}
        return {name: leave.get(name, 0.0) for name in self.sums()}

    def value(self) -> dict[str, float]:
        """Flat metrics; a class no patient has is absent, as are intervals of fewer than two patients.

        `dice_<k>`, `iou_<k>` (k from 1): mean over patients; `dice_mean`, `iou_mean`: mean of those
        over classes. `volume_error_ml_<k>`, `volume_error_abs_ml_<k>`: mean error and mean absolute
        error. `empty_<k>`: patients left out. `_lo`, `_hi`: normal 95 % interval of the mean.
        `<measure>_<k>`, `<measure>_mean` (over classes) and `<measure>_empty_<k>` likewise; mm for distances.
        """
        found: dict[str, float] = {}
        classes = range(len(self.present))
        means: dict[str, list[float]] = {"dice": [], "iou": []}
        for k in classes:
            found[f"empty_{k + 1}"] = float(self.empty[k])
            n = float(self.present[k])
            if n <= 0:
                continue
            for name in means:
                mean = min(1.0, max(0.0, float(getattr(self, name)[k]) / n))  # noised sums go beyond
                found[f"{name}_{k + 1}"] = mean
                means[name].append(mean)
            if n >= 2:
                half = interval(float(self.dice[k]), float(self.dice_squared[k]), n)
                _around(found, f"dice_{k + 1}", half)
            if len(self.volume):
                found[f"volume_error_ml_{k + 1}"] = float(self.volume[k]) / n
                found[f"volume_error_abs_ml_{k + 1}"] = float(self.volume_absolute[k]) / n
        if means["dice"]:
            for name, values in means.items():
                found[f"{name}_mean"] = sum(values) / len(values)
            if float(self.some) >= 2:
                _around(
                    found, "dice_mean", interval(float(self.mean), float(self.mean_squared), float(self.some))
                )
        for name, table in zip(self.measures, self.measured.tolist(), strict=True):
            found |= self._measure(name, table)
        return found

    def _measure(self, name: str, table: list[list[float]]) -> dict[str, float]:
        found, means = {}, []
        for k, (n, total, squares) in enumerate(table):
            found[f"{name}_empty_{k + 1}"] = float(self.count) - n
            if n <= 0:
                continue
            means.append(total / n)
            found[f"{name}_{k + 1}"] = means[-1]
            if n >= 2:
                most = math.inf if name in DISTANCES else 1.0
                _around(found, f"{name}_{k + 1}", interval(total, squares, n), most)
        return found | ({f"{name}_mean": sum(means) / len(means)} if means else {})


def _around(found: dict[str, float], name: str, half: float, most: float = 1.0) -> None:
    """Add the interval of what lies between 0 and `most`."""
    found[f"{name}_lo"] = max(0.0, found[name] - half)
    found[f"{name}_hi"] = min(most, found[name] + half)


def _further(cases: Sequence[tuple[Tensor, Tensor, Sequence[float]]], classes: int, depth: Depth) -> Tensor:
    """A patient's measures per class, each the mean over the cases that have it: `M x K`, NaN: none has."""
    if not depth.names:
        return torch.zeros(0, classes, dtype=torch.float64)
    rows = [
        [depth.of_masks(truth == k, given == k, mm) for k in range(1, classes + 1)]
        for truth, given, mm in cases
    ]
    return torch.tensor(rows, dtype=torch.float64).nanmean(0).T


def _overlap(truth: Tensor, given: Tensor, spacing: Sequence[float], classes: int) -> Tensor:
    """Per foreground class: Dice, IoU, volume error and its size in ml; `K x 4` float64, NaN where empty."""
    if truth.shape != given.shape:
        raise ValueError(f"prediction has shape {tuple(given.shape)}; the truth has {tuple(truth.shape)}")
    n = classes + 1
    if max(int(truth.max()), int(given.max())) >= n:
        raise ValueError(
            f"a mask holds class {max(int(truth.max()), int(given.max()))}; classes are 0 to {classes}"
        )
    pairs = torch.bincount(truth.flatten().long() * n + given.flatten().long(), minlength=n * n)
    table = pairs.view(n, n).cpu().double()
    both = table.diagonal()[1:]
    true, said = table.sum(1)[1:], table.sum(0)[1:]
    ml = math.prod(spacing) / 1000
    empty = (true + said) == 0
    rows = torch.stack(
        [2 * both / (true + said), both / (true + said - both), (said - true) * ml, (said - true).abs() * ml],
        1,
    )
    rows[empty] = torch.nan
    return rows
