"""The fingerprint of a data set: additive histograms from which a plan is made, and sites are compared.

Every histogram has fixed public cells, counts each patient once and has a first cell `none`, so each sums
to the number of patients (intensities: to `UNIT` per patient). All numbers are whole: sums over sites are
exact, whatever the order, and equal to those of the pooled data.

**Small cells.** What leaves a site has no cell with fewer patients behind it than the site's minimum. A
smaller one is zeroed, and its patients are counted in a neighbouring cell: going along the scale, cells are
put together until they reach the minimum, and what is left at the end joins the last; each run then stands
at its fullest cell. Dropping patients instead would tell their number to whoever subtracts from the total.
With a minimum of 1 nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from tasks.base import Case
from tasks.metrics import Statistics

UNIT = 2**16
"""What a patient's intensities sum to; a smaller share of voxels than 1/UNIT is not seen."""

UNITS = ("", "HU", "SUVbw")
"""Units that a case may name; any other counts as the cell after these."""

MAX_CHANNELS = 4
_SAMPLE = 2**21  # voxels of a case that are counted, at least: every n-th of a larger one
_KNEE = 16.0  # intensities: linear below 1/16, logarithmic beyond


@dataclass(frozen=True)
class Cells:
    """The scale of a histogram. Cell 0 is `none`; cell c > 0 stands for step `first + c - 1`.

    Attributes:
        kind: step of a value v, times 1/per: `log` log2 v, `symlog` sign(v) log2(1 + 16 |v|), `linear` v.
        first, last: steps; what lies beyond is counted in them. per: steps per octave, or per 1.
    """

    kind: Literal["log", "symlog", "linear"]
    first: int
    last: int
    per: int

    @property
    def size(self) -> int:
        """How many cells."""
        return self.last - self.first + 2

    def of(self, values: Tensor) -> Tensor:
        """The cells (int64) of finite values."""
        v = values.double()
        if self.kind == "log":
            v = v.clamp_min(2.0**-1000).log2()  # 0 is the lowest cell
        elif self.kind == "symlog":
            v = v.sign() * torch.log2(1 + _KNEE * v.abs())
        return (v * self.per).round().clamp(self.first, self.last).long() - self.first + 1

    def position(self, cell: float) -> float:
        """Where a cell stands on the scale, in octaves (`linear`: in values)."""
        return (cell - 1 + self.first) / self.per

    def value(self, cell: float) -> float:
        """The value in the middle of a cell; fractions of a cell give the bounds between cells."""
        t = self.position(cell)
        if self.kind == "log":
            return float(2.0**t)
        if self.kind == "symlog":
            return math.copysign((2.0 ** abs(t) - 1) / _KNEE, t)
        return t

    def round_value(self, cell: int) -> float:
        """The roundest number in a cell: of fewest decimal digits, then nearest to its middle."""
        low, high, middle = self.value(cell - 0.5), self.value(cell + 0.5), self.value(cell)
        for digits in range(1, 16):
            found = float(f"{middle:.{digits - 1}e}")
            if low < found < high:
                return found
        return middle


CELLS: dict[str, Cells] = {
    "axes": Cells("linear", 2, 3, 1),
    "channels": Cells("linear", 1, 8, 1),
    "units": Cells("linear", 0, len(UNITS), 1),
    "spacing": Cells("log", -12 * 24, 12 * 24, 24),
    "shape": Cells("log", 0, 13 * 24, 24),
    "intensity": Cells("symlog", -34 * 16, 34 * 16, 16),
    "foreground": Cells("symlog", -34 * 16, 34 * 16, 16),
    "level": Cells("symlog", -34 * 16, 34 * 16, 16),
    "spread": Cells("log", -10 * 8, 31 * 8, 8),
    "voxels": Cells("log", -1, 32 * 4, 4),
    "volume": Cells("log", -14 * 8, 14 * 8, 8),
    "position": Cells("linear", 0, 20, 20),
}
"""The public scale of each histogram, by field."""

_SHARED = frozenset({"intensity", "foreground"})  # a patient is spread over their cells


@dataclass(frozen=True)
class Fingerprint(Statistics):
    """Histograms over patients; a patient of several cases counts with the (lower) median of them.

    All float64 of whole numbers. `K` foreground classes, cells as in `CELLS`, 3 axes, 4 channels.

    Attributes:
        count: scalar, patients.
        axes, channels: of the image. units: index in `UNITS`.
        spacing, shape: 3 x cells, mm and voxels in array order (2D: the third is `none`).
        intensity, foreground: 4 x cells, shares of voxels in 1/UNIT, of the image and inside the mask.
        level, spread: median and interquartile range of the first channel inside the mask (without one:
            of the image), as stored.
        voxels, volume: K x cells, size of a class, in ml (2D: thousands of mm²); absent in an annotated
            patient is the lowest cell.
        position: K x 3 x cells, centre of a class as a fraction of the image's side.
    """

    count: Tensor
    axes: Tensor
    channels: Tensor
    units: Tensor
    spacing: Tensor
    shape: Tensor
    intensity: Tensor
    foreground: Tensor
    level: Tensor
    spread: Tensor
    voxels: Tensor
    volume: Tensor
    position: Tensor

    @property
    def patients(self) -> int:
        """How many patients stand behind it."""
        return round(float(self.count))

    def value(self) -> dict[str, float]:
        """Medians, by histogram: `spacing_0`, `volume_1`, …; what nobody has is absent."""
        found = {"patients": float(self.count)}
        for name, cells in CELLS.items():
            rows = getattr(self, name).reshape(-1, cells.size)
            for i, row in enumerate(rows):
                cell = quantile(row, 0.5)
                if cell is not None:
                    rounded = name in ("spacing", "shape")
                    value = cells.round_value(cell) if rounded else cells.value(cell)
                    found[f"{name}_{i}" if len(rows) > 1 else name] = value
        return found

    def suppressed(self, seen: Self, minimum: int) -> Self:
        """What may leave a site.

        Args:
            seen: in each cell, how many patients are in it at all.
            minimum: fewest patients behind a cell.
        """
        made = {"count": self.count if self.patients >= minimum else torch.zeros_like(self.count)}
        for name, cells in CELLS.items():
            values = getattr(self, name)
            rows = zip(
                values.reshape(-1, cells.size), getattr(seen, name).reshape(-1, cells.size), strict=True
            )
            out = [_pooled(row, behind, minimum, shared=name in _SHARED) for row, behind in rows]
            made[name] = torch.stack(out).reshape(values.shape) if out else values
        return type(self)(**made)


def _pooled(row: Tensor, seen: Tensor, minimum: int, *, shared: bool) -> Tensor:
    """One histogram without small cells; of cells that share patients the fullest counts, not their sum."""
    out = torch.zeros_like(row)
    run: list[int] = []
    behind, last = 0.0, -1
    for cell in seen.nonzero().flatten().tolist():
        run.append(cell)
        n = float(seen[cell])
        behind = max(behind, n) if shared else behind + n
        if behind >= minimum:
            last = max(run, key=lambda c: float(seen[c]))
            out[last] = row[run].sum()
            run, behind = [], 0.0
    if run and last >= 0:
        out[last] += row[run].sum()
    return out


def quantile(row: Tensor, q: float) -> int | None:
    """The lowest cell with at least the share `q` of a histogram at or below it; `none` is left out."""
    sums = row[1:].double().cumsum(0)
    if not len(sums) or float(sums[-1]) <= 0:
        return None
    return 1 + int((sums < q * sums[-1]).sum())


@dataclass(frozen=True)
class Survey:
    """Counts cases.

    Attributes:
        image, mask: their names in a case. classes: of the mask, with the background; 0: there is no mask.
    """

    image: str = "image"
    mask: str = "mask"
    classes: int = 0

    def zero(self) -> Fingerprint:
        """Of no patient; fixes what may come back from a site."""
        k = max(0, self.classes - 1)
        rows: dict[str, tuple[int, ...]] = {
            "spacing": (3,),
            "shape": (3,),
            "intensity": (MAX_CHANNELS,),
            "foreground": (MAX_CHANNELS,),
            "voxels": (k,),
            "volume": (k,),
            "position": (k, 3),
        }
        made = {
            name: torch.zeros((*rows.get(name, ()), cells.size), dtype=torch.float64)
            for name, cells in CELLS.items()
        }
        return Fingerprint(torch.zeros((), dtype=torch.float64), **made)

    def of_site(self, patients: Iterable[Sequence[Case]], minimum: int) -> Fingerprint:
        """What may leave a site about its patients."""
        total = seen = self.zero()
        for cases in patients:
            one = self.of_patient(cases)
            total = total + one
            seen = seen + one.from_vector((one.to_vector() > 0).double())
        return total.suppressed(seen, minimum)

    def of_patient(self, cases: Sequence[Case]) -> Fingerprint:
        """One patient, from all of their cases that have the image; without any, all is `none`."""
        measured = [self._measure(case) for case in cases if self.image in case.images]
        zero = self.zero()
        made = {"count": torch.ones((), dtype=torch.float64)}
        for name, cells in CELLS.items():
            shape = getattr(zero, name).shape
            if not measured:
                row = torch.zeros(shape, dtype=torch.float64)
                row[..., 0] = UNIT if name in _SHARED else 1
            elif name in _SHARED:
                row = _whole(torch.stack([m[name] for m in measured]).mean(0))
            else:
                row = _one_hot(torch.stack([m[name] for m in measured]), cells)
            made[name] = row
        return Fingerprint(**made)

    def _measure(self, case: Case) -> dict[str, Tensor]:
        """A case's numbers: float64, NaN where there is none; of intensities the share of each cell."""
        image = case.images[self.image]
        sides, channels = image.shape[1:], image.shape[0]
        mask = case.masks.get(self.mask) if self.classes else None
        flat = image.flatten(1)
        inside = None if mask is None else flat[:, (mask > 0).flatten()]
        first = flat[0] if inside is None or not inside.shape[1] else inside[0]
        low, middle, high = torch.quantile(
            _thin(first).double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        ).tolist()
        unit = UNITS.index(case.units) if case.units in UNITS else len(UNITS)
        padding = [math.nan] * (3 - len(sides))
        return {
            "axes": _row(len(sides)),
            "channels": _row(channels),
            "units": _row(unit),
            "spacing": _row([*case.spacing, *padding]),
            "shape": _row([*sides, *padding]),
            "intensity": _histogram(flat, CELLS["intensity"]),
            "foreground": _histogram(inside, CELLS["foreground"]),
            "level": _row(middle),
            "spread": _row(high - low),
            **self._sizes(mask, case),
        }

    def _sizes(self, mask: Tensor | None, case: Case) -> dict[str, Tensor]:
        """Per foreground class: voxels, volume and centre; nothing of a class that nobody looked for."""
        k = max(0, self.classes - 1)
        voxels = torch.full((k,), math.nan, dtype=torch.float64)
        centres = torch.full((k, 3), math.nan, dtype=torch.float64)
        for label in range(1, k + 1):
            if mask is None or (case.annotates is not None and label not in case.annotates):
                continue
            here = mask == label
            for axis, side in enumerate(mask.shape):
                # the sum along the other axes: no list of voxels is ever held
                along = here.sum([a for a in range(mask.ndim) if a != axis]).double()
                middle = torch.arange(side, dtype=torch.float64) + 0.5
                centres[label - 1, axis] = (along * middle).sum() / along.sum() / side
            voxels[label - 1] = along.sum()
        volume = voxels * (math.prod(case.spacing) / 1000)
        return {"voxels": voxels, "volume": volume, "position": centres}


def _row(values: float | Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _thin(values: Tensor) -> Tensor:
    """Every n-th of very many values (last axis)."""
    return values[..., :: max(1, values.shape[-1] // _SAMPLE)]


def _histogram(values: Tensor | None, cells: Cells) -> Tensor:
    """The share of each cell in each channel's values (`C N`): `MAX_CHANNELS x cells`."""
    out = torch.zeros((MAX_CHANNELS, cells.size), dtype=torch.float64)
    for c, row in enumerate(out):
        if values is None or c >= len(values) or not values.shape[1]:
            row[0] = 1
            continue
        thin = _thin(values[c])
        row += torch.bincount(cells.of(thin), minlength=cells.size) / len(thin)
    return out


def _whole(shares: Tensor) -> Tensor:
    """Shares as whole numbers that sum to `UNIT`; what rounding down leaves over goes to the fullest cell."""
    whole = (shares * UNIT).floor()
    fullest = whole.argmax(-1, keepdim=True)
    return whole.scatter_add(-1, fullest, UNIT - whole.sum(-1, keepdim=True))


def _one_hot(values: Tensor, cells: Cells) -> Tensor:
    """The cell of the lower median of values (first axis), NaN left out: `... x cells`."""
    if not values.numel():
        return torch.zeros((*values.shape[1:], cells.size), dtype=torch.float64)
    middle = values.nanmedian(0).values
    cell = torch.where(middle.isnan(), 0, cells.of(middle.nan_to_num(0)))
    return torch.nn.functional.one_hot(cell, cells.size).double()
