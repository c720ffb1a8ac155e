"""Made-up CT patients of several hospitals, as DICOM series with labels: demo and tests need no real one.

Each patient has an elliptical body with fat, muscle and spine, a liver (segment 1) with lesions
(segment 2, inside the liver's segment), and further organs that nobody labelled. Hospitals differ in
contrast phase (how bright organs are), spacing, blur, noise, manufacturer and rescaling; and at all but the
first another unlabelled organ looks like the liver: bright as it, with spots like lesions. What tells the
liver apart at one hospital misleads at the others, so a model of one does worse there than a model of all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d  # type: ignore[import-untyped]

from conf.exits import Exit, Stop
from tasks.data.phantom_files import PLAIN, Form, Scan, Scanner
from tasks.data.source import Array

_THICK = 120.0  # mm along the body that a series covers
_WIDE = 320.0  # mm across


@dataclass(frozen=True)
class _Hospital:
    """How one hospital scans.

    Attributes:
        liver, lesion, spleen, stomach, bowel, kidney: HU.
        double: the organ that looks like the liver there, if any.
        wide: field of view over 320 mm. slice_mm, blur_mm: mm. noise: standard deviation, HU. offset: HU.
    """

    liver: float
    lesion: float
    spleen: float
    stomach: float
    bowel: float
    kidney: float
    double: str
    wide: float
    slice_mm: float
    blur_mm: float
    noise: float
    offset: float
    scanner: Scanner


_SIEMENS = Scanner("SIEMENS", "B30f", 1.0, -1024.0)
_GE = Scanner("GE MEDICAL SYSTEMS", "BONE", 1.0, 0.0)
_PHILIPS = Scanner("Philips", "A", 0.5, -1024.0)
_HOSPITALS = (
    # portal venous phase: every organ has a brightness of its own
    _Hospital(115.0, 40.0, 175.0, 15.0, -25.0, 200.0, "", 1.0, 6.0, 2.0, 8.0, 0.0, _SIEMENS),
    # late arterial phase, sharp and noisy, with contrast in the bowel
    _Hospital(88.0, 25.0, 140.0, 8.0, 88.0, 165.0, "bowel", 0.92, 5.0, 1.0, 24.0, 6.0, _GE),
    # no contrast: spleen and liver look alike
    _Hospital(58.0, 5.0, 58.0, -350.0, 5.0, 30.0, "spleen", 1.08, 8.0, 3.5, 8.0, -6.0, _PHILIPS),
)


def make_phantom(
    folder: Path,
    *,
    hospitals: int = 3,
    patients: int = 16,
    seed: int = 0,
    size: int = 64,
    forms: Sequence[Form] = PLAIN,
) -> None:
    """Write `hospital_a/01/1/*.dcm`, … below `folder`; equal arguments give equal files.

    Args:
        patients: per hospital; every third has a second series. size: rows and columns. forms: how each
            hospital writes its files, in turn; image and labels are the same in all.

    Raises:
        Stop: (`CONFIG`) a number out of range.
    """
    for name, value, low, high in (
        ("hospitals", hospitals, 1, 26),
        ("patients", patients, 1, 99),
        ("size", size, 16, 512),
    ):
        if not low <= value <= high:
            raise Stop(Exit.CONFIG, f"phantom {name} is {value}; accepted {low} to {high}")
    for h in range(hospitals):
        letter = chr(ord("a") + h)
        here, form = _HOSPITALS[h % len(_HOSPITALS)], forms[h % len(forms)]
        for p in range(1, patients + 1):
            draw = np.random.default_rng([seed, h, p])
            body = _Body.drawn(draw)
            for s in range(1, 2 + (p % 3 == 0)):
                scan = _scan(f"{seed}/{letter}/{p}/{s}", here, body, size, draw)
                scan.write(folder / f"hospital_{letter}" / f"{p:02}" / str(s), form)


def _scan(name: str, here: _Hospital, body: _Body, size: int, draw: np.random.Generator) -> Scan:
    """One series of one patient; `name` is seed, hospital, patient, series."""
    _, hospital, patient, number = name.split("/")
    pixel = _WIDE * here.wide / size
    count = max(4, round(_THICK / here.slice_mm))
    first = np.array([*(2 * [-pixel * (size - 1) / 2]), -here.slice_mm * (count - 1) / 2])
    first += draw.uniform(-4, 4, 3).round(2)
    k, r, c = np.meshgrid(np.arange(count), np.arange(size), np.arange(size), indexing="ij")
    points = first + np.stack([c * pixel, r * pixel, k * here.slice_mm], axis=-1)
    hu, truth = body.scan(points, here, draw)
    hu = gaussian_filter(hu, (0, here.blur_mm / pixel, here.blur_mm / pixel))
    hu = gaussian_filter1d(hu, 0.4, axis=0)
    grain = gaussian_filter(draw.normal(size=hu.shape), (0, 0.5, 0.5))
    hu += here.offset + grain / grain.std() * here.noise
    return Scan(
        name=name,
        hospital=hospital,
        patient=int(patient),
        number=int(number),
        sex=body.sex,
        age=body.age,
        scanner=here.scanner,
        hu=np.clip(np.rint(hu), -1024, 3071),
        truth=truth,
        first=first,
        pixel=pixel,
        slice_mm=here.slice_mm,
    )


@dataclass(frozen=True)
class _Ball:
    """An ellipsoid: centre and half axes in mm."""

    centre: Array
    half: Array

    def holds(self, points: Array) -> Array:
        inside: Array = (((points - self.centre) / self.half) ** 2).sum(-1) < 1
        return inside


#: organs that can look like the liver: centre in half widths of the body (x, y) and mm (z), half axes in mm
_OTHERS = {
    "stomach": ((0.3, -0.42, 8.0), (40.0, 32.0, 38.0)),
    "spleen": ((0.6, 0.3, 10.0), (32.0, 36.0, 40.0)),
    "bowel": ((0.45, -0.05, -22.0), (40.0, 38.0, 30.0)),
}


@dataclass(frozen=True)
class _Body:
    """One patient's anatomy, in mm; x to the left, y to the back, z to the head (DICOM's LPS)."""

    half: Array
    turn: float
    shift: Array
    sex: str
    age: int
    kidneys: tuple[_Ball, _Ball]
    others: Mapping[str, _Ball]
    liver: tuple[_Ball, _Ball]
    spots: Mapping[str, tuple[_Ball, ...]]

    @classmethod
    def drawn(cls, draw: np.random.Generator) -> _Body:
        half = np.array([135.0, 95.0]) * draw.uniform(0.85, 1.1, 2)
        body = np.array([*half, 1.0])
        right = body * [-0.42, -0.1, 5.0] + draw.normal(0, [9.0, 9.0, 14.0])
        main = _Ball(right, np.array([54.0, 52.0, 46.0]) * draw.uniform(0.75, 1.2, 3))
        lobe = _Ball(
            right + np.array([main.half[0] * 0.8, -20.0, draw.normal(8.0, 8.0)]),
            np.array([42.0, 24.0, 30.0]) * draw.uniform(0.7, 1.25, 3),
        )
        others = {
            name: _Ball(body * centre + draw.normal(0, 7.0, 3), np.array(axes) * draw.uniform(0.85, 1.15, 3))
            for name, (centre, axes) in _OTHERS.items()
        }
        low = draw.normal(-38.0, 10.0)
        kidney = np.array([20.0, 17.0, 30.0])
        return cls(
            half=half,
            turn=float(draw.uniform(-12, 12)),
            shift=draw.normal(0, [10.0, 10.0, 6.0]),
            sex="FM"[int(draw.integers(2))],
            age=int(draw.integers(25, 90)),
            kidneys=(_Ball(body * [-0.42, 0.48, low], kidney), _Ball(body * [0.42, 0.48, low + 6], kidney)),
            others=others,
            liver=(main, lobe),
            spots={name: _spots(ball, draw) for name, ball in {"liver": main, **others}.items()},
        )

    def scan(self, points: Array, here: _Hospital, draw: np.random.Generator) -> tuple[Array, Array]:
        """HU (before blur and noise) and segment numbers at `points` (`…3`, LPS mm)."""
        angle = np.deg2rad(self.turn)
        back = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
        own = (points - self.shift) @ back
        flat = own[..., :2]
        radius = np.sqrt(((flat / self.half) ** 2).sum(-1))
        inside = radius < 0.8
        hu = np.full(points.shape[:-1], -1000.0)
        for edge, value in ((1.0, -95.0), (0.9, 45.0), (0.8, -60.0)):  # fat, muscle, what lies between organs
            hu[radius < edge] = value
        spine = ((flat - [0, 0.62 * self.half[1]]) ** 2).sum(-1) < 19.0**2
        liver = (self.liver[0].holds(own) | self.liver[1].holds(own)) & inside & ~spine
        level = here.liver + draw.normal(0, 6.0)
        lesion = level + here.lesion - here.liver + draw.normal(0, 4.0)
        for kidney in self.kidneys:
            hu[kidney.holds(own) & inside] = here.kidney + draw.normal(0, 6.0)
        for name, ball in self.others.items():
            organ = ball.holds(own) & inside
            hu[organ] = getattr(here, name) + draw.normal(0, 6.0)
            if name == here.double:
                hu[organ & _any(self.spots[name], own)] = lesion
        hu[spine] = 330.0
        hu[liver] = level
        spots = liver & _any(self.spots["liver"], own)
        hu[spots] = lesion
        return hu, np.where(spots, 2, liver.astype(int))


def _spots(organ: _Ball, draw: np.random.Generator) -> tuple[_Ball, ...]:
    """One to three lesions well inside an organ."""
    found = []
    for _ in range(int(draw.integers(1, 4))):
        way = draw.normal(size=3)
        centre = organ.centre + 0.55 * organ.half * way / np.linalg.norm(way)
        found.append(_Ball(centre, draw.uniform(13.0, 23.0) * draw.uniform(0.85, 1.15, 3)))
    return tuple(found)


def _any(balls: Sequence[_Ball], points: Array) -> Array:
    held: Array = np.logical_or.reduce([ball.holds(points) for ball in balls])
    return held
