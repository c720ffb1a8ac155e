"""How sites differ, and which of them look wrong: from their fingerprints alone.

A site is held against the median over sites, so that one bad site of three does not bend what it is held
against. Thresholds are wide: what is named here is an error or another kind of data, not another scanner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median_low
from typing import Any, Literal

import torch
from torch import Tensor

from tasks.data.fingerprint import CELLS, UNITS, Fingerprint, quantile

FAR = 4.0
"""Spacing and size of the body, in times the others'."""

SCALED = 8.0
"""Spread of intensities, in times the others'."""

LARGER = 3.0
"""Volume of a class, in times the others'."""

AXES = ("x (right)", "y (front)", "z (head)")


@dataclass(frozen=True)
class Finding:
    """Something about a site that stands out.

    Attributes:
        kind: what looks wrong. what: the numbers. advice: what to do, a sentence.
    """

    site: str
    kind: Literal["spacing", "intensity", "units", "labels", "orientation", "image"]
    what: str
    advice: str


@dataclass(frozen=True)
class Comparison:
    """Pairwise distances and findings.

    Attributes:
        sites: medians by site.
        distances: of each pair by name, Wasserstein-1 in octaves (`position`: in sides of the image), and
            `intensity_js`, `foreground_js`, Jensen-Shannon from 0 (equal) to 1.
    """

    sites: dict[str, dict[str, float]]
    distances: dict[str, dict[str, float]]
    findings: tuple[Finding, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"distances": self.distances, "findings": [vars(one) for one in self.findings]}


def compare(sites: Mapping[str, Fingerprint]) -> Comparison:
    """Hold sites against each other."""
    names = sorted(name for name, one in sites.items() if one.patients)
    distances = {f"{a} - {b}": _distances(sites[a], sites[b]) for a, b in combinations(names, 2)}
    view = _View({name: sites[name] for name in names})
    found: list[Finding] = []
    if len(names) > 1:
        for name in names:
            spacing = _spacing(view, name)
            found += [*_image(view, name), *spacing, *_intensity(view, name)]
            found += [*_labels(view, name, trusted=not spacing), *_orientation(view, name)]
    if len(names) == 2:
        note = " Of two sites nobody can tell which one is wrong."
        found = [Finding(f.site, f.kind, f.what, f.advice + note) for f in found]
    return Comparison({name: sites[name].value() for name in names}, distances, tuple(found))


@dataclass(frozen=True)
class _View:
    """The sites, and one number of each beside the number it is held against."""

    sites: Mapping[str, Fingerprint]

    def beside(
        self, name: str, of: Callable[[Fingerprint], float | None]
    ) -> tuple[float, float] | tuple[None, None]:
        """This site's number and the median over sites (of two sites: the other's)."""
        values = {site: of(one) for site, one in self.sites.items()}
        own = values[name]
        known = [v for site, v in values.items() if v is not None and (len(values) > 2 or site != name)]
        return (own, median_low(known)) if own is not None and known else (None, None)

    def median(self, name: str, histogram: str, row: int = 0) -> tuple[float, float] | tuple[None, None]:
        """The same of a histogram's median."""
        cells = CELLS[histogram]

        def of(one: Fingerprint) -> float | None:
            cell = quantile(getattr(one, histogram).reshape(-1, cells.size)[row], 0.5)
            return None if cell is None else cells.value(cell)

        return self.beside(name, of)

    @property
    def classes(self) -> int:
        return len(next(iter(self.sites.values())).volume)


def _image(view: _View, name: str) -> list[Finding]:
    """Axes, channels and units."""
    found = []
    for histogram in ("axes", "channels"):
        own, others = view.median(name, histogram)
        if own is not None and own != others:
            what = f"{own:.0f} {histogram} where others have {others:.0f}"
            found.append(Finding(name, "image", what, "Check which files were taken for images."))
    own, others = view.median(name, "units")
    if own is not None and others is not None and own != others:
        mine, theirs = (
            repr(UNITS[int(u)]) if int(u) < len(UNITS) and UNITS[int(u)] else "no known unit"
            for u in (own, others)
        )
        advice = "Check modality and rescale type: the plan's numbers are in the others' unit."
        found.append(Finding(name, "units", f"images in {mine} where others have {theirs}", advice))
    return found


def _spacing(view: _View, name: str) -> list[Finding]:
    """Voxels, and with them bodies, of another size on every axis; or axes in another order."""
    spacing, extent, mine, theirs = [], [], [], []
    for axis in range(3):
        own, others = view.median(name, "spacing", axis)
        side, sides = view.median(name, "shape", axis)
        if own is None or others is None or side is None or sides is None:
            continue
        spacing.append(own / others)
        extent.append(own * side / (others * sides))
        mine.append(own * side)
        theirs.append(others * sides)
    if not spacing:
        return []
    factor = math.prod(spacing) ** (1 / len(spacing))
    alike = max(spacing) < 1.5 * min(spacing)
    far = all(x > FAR for x in extent) or all(x < 1 / FAR for x in extent)
    if alike and far and max(factor, 1 / factor) > FAR:
        unit = " (as cm for mm is)" if 8 < max(factor, 1 / factor) < 12.5 else ""
        what = f"spacing is {_times(factor)} the others' on every axis, and so is the field of view{unit}"
        advice = (
            "Correct the unit of the spacing in the files before ingest: volumes and resampling follow it."
        )
        return [Finding(name, "spacing", what, advice)]
    if len(mine) == 3 and _permuted(mine, theirs):
        what = (
            f"fields of view of {_mm(mine)} where others have {_mm(theirs)}: the same sides in another order"
        )
        return [Finding(name, "orientation", what, "Check the orientation in the headers: axes are swapped.")]
    return []


def _intensity(view: _View, name: str) -> list[Finding]:
    """Values on another scale, or shifted."""
    spread, spreads = view.median(name, "spread")
    level, levels = view.median(name, "level")
    if not spread or not spreads or level is None or levels is None:
        return []
    scale, shift = spread / spreads, level - levels
    if max(scale, 1 / scale) >= SCALED:
        what = (
            f"intensities spread {_times(scale)} as far as the others' (median {level:.3g}, not {levels:.3g})"
        )
        advice = (
            "Check rescale slope and unit; only where each image is scaled by itself (normalise=zscore) may "
            "they stay."
        )
        return [Finding(name, "intensity", what, advice)]
    if abs(shift) > 3 * max(spread, spreads):
        offset = 950 < abs(shift) < 1100
        what = f"intensities lie {shift:+.0f} from the others' (median {level:.0f}, not {levels:.0f})"
        advice = (
            "Apply the rescale intercept: these look like stored CT values, not HU."
            if offset
            else "Check rescale intercept and unit."
        )
        return [Finding(name, "intensity", what, advice)]
    return []


def _labels(view: _View, name: str, *, trusted: bool) -> list[Finding]:
    """Classes that are missing or of another size (in voxels where the spacing is not to be trusted)."""
    found = []
    for k in range(view.classes):
        own, others = view.beside(name, lambda one, k=k: _missing(one.volume[k]))  # type: ignore[misc]
        if own is None or others is None:
            continue
        if own > 0.9 and others < 0.5:
            what = f"{own:.0%} of the annotated patients lack class {k + 1}, {others:.0%} elsewhere"
            advice = "Check the label map, or state that this site does not annotate the class."
            found.append(Finding(name, "labels", what, advice))
            continue
        size, sizes = view.median(name, "volume" if trusted else "voxels", k)
        if size and sizes and max(size / sizes, sizes / size) > LARGER and own < 0.5 and others < 0.5:
            what = f"class {k + 1} is {_times(size / sizes)} as large as elsewhere"
            advice = "Look at some masks: another class under its value, or another definition of its border."
            found.append(Finding(name, "labels", what, advice))
    return found


def _orientation(view: _View, name: str) -> list[Finding]:
    """Classes that lie where their mirror image lies elsewhere."""
    mirrored = set()
    for k in range(view.classes):
        for axis in range(3):
            own, others = view.beside(name, lambda one, k=k, a=axis: _moments(one.position[k, a])[0])  # type: ignore[misc]
            if own is None or others is None:
                continue
            deviation = _moments(view.sites[name].position[k, axis])[1]
            if (
                abs(own - others) > max(0.1, 2 * deviation)
                and abs(own - (1 - others)) < abs(own - others) / 2
            ):
                mirrored.add(axis)
    return [
        Finding(
            name,
            "orientation",
            f"classes lie mirrored along {AXES[axis]}",
            "Check the direction in the headers and look at a mask over its image.",
        )
        for axis in sorted(mirrored)
    ]


def _missing(row: Tensor) -> float | None:
    """Share of the annotated patients without a class."""
    annotated = float(row[1:].sum())
    return float(row[1]) / annotated if annotated else None


def _moments(row: Tensor) -> tuple[float | None, float]:
    """Mean and deviation of the positions of a class."""
    total = float(row[1:].sum())
    if not total:
        return None, 0.0
    at = torch.tensor([CELLS["position"].value(c) for c in range(1, len(row))], dtype=torch.float64)
    mean = float((row[1:] * at).sum()) / total
    return mean, math.sqrt(float((row[1:] * (at - mean) ** 2).sum()) / total)


def _permuted(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    same = all(0.85 < a / b < 1.18 for a, b in zip(sorted(mine), sorted(theirs), strict=True))
    return same and any(not 0.75 < a / b < 1.34 for a, b in zip(mine, theirs, strict=True))


def _distances(a: Fingerprint, b: Fingerprint) -> dict[str, float]:
    """Of two sites; several rows (axes, classes): the farthest."""
    found = {}
    for name in ("spacing", "shape", "level", "spread", "intensity", "foreground", "volume", "position"):
        cells = CELLS[name]
        pairs = list(
            zip(
                getattr(a, name).reshape(-1, cells.size),
                getattr(b, name).reshape(-1, cells.size),
                strict=True,
            )
        )
        far = [d for d in (wasserstein(x, y, cells.per) for x, y in pairs) if d is not None]
        if far:
            found[name] = round(max(far), 4)
        if name in ("intensity", "foreground") and far:
            found[f"{name}_js"] = round(jensen_shannon(*pairs[0]), 4)
    return found


def wasserstein(a: Tensor, b: Tensor, per: int) -> float | None:
    """Wasserstein-1 distance of two histograms on their scale, without `none`; None: one is empty."""
    x, y = a[1:].double(), b[1:].double()
    if not float(x.sum()) or not float(y.sum()):
        return None
    gaps = (x / x.sum()).cumsum(0) - (y / y.sum()).cumsum(0)
    return float(gaps.abs().sum()) / per


def jensen_shannon(a: Tensor, b: Tensor) -> float:
    """Jensen-Shannon divergence in bits (Lin, 1991): 0 equal, 1 nothing in common."""
    x, y = a.double() / a.sum(), b.double() / b.sum()
    middle = (x + y) / 2
    parts = [torch.where(p > 0, p * (p / middle.clamp_min(1e-300)).log2(), 0.0).sum() for p in (x, y)]
    return min(1.0, max(0.0, float(parts[0] + parts[1]) / 2))


def _times(factor: float) -> str:
    return f"{_two(factor)} times" if factor >= 1 else f"1/{_two(1 / factor)} of"


def _two(value: float) -> str:
    """Two digits: no more is known."""
    return f"{float(f'{value:.2g}'):g}"


def _mm(sides: Sequence[float]) -> str:
    return "x".join(f"{s:.0f}" for s in sides) + " mm"
