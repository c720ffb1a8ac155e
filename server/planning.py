"""From a fingerprint to a plan: rules, each of which says in a sentence why.

The reasoning is nnU-Net's (Isensee et al., 2021, Nature Methods 18, 203-211, doi:10.1038/s41592-020-01008-z),
on histograms instead of cases: target spacing, patch and network follow from what most images are like and
from the memory there is. What the user set on the command line stays, and later rules build on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from conf.schema import Plan, Section
from tasks.data.fingerprint import CELLS, UNITS, Fingerprint, quantile

ANISOTROPIC = 3.0
"""An axis this many times coarser than the finest is treated apart."""

FREE = {"unet": 1, "dyn_unet": 2}
"""Networks whose depth and strides can be chosen, and the halvings they need at least."""

_FIXED = 4  # halvings of basic_unet

SMALLEST = 4
"""Sides of the network's deepest feature map, at least."""

MOST_HALVINGS = 5
WIDEST = {2: 512, 3: 320}
BATCH_SHARE = 0.05
"""A batch holds at most this share of a site's patients."""

# float32 maps of a level in training: two blocks of 3 on the way down, two up, and their gradients. It is an
# upper bound: dyn_unet was measured to keep 0.42 of it for the backward pass, unet 0.09 to 0.14.
_COPIES = 24


@dataclass(frozen=True)
class Decision:
    """One setting of a plan, and why.

    Attributes:
        setting: dotted, as on a command line. value: what the plan has. rule: what the rule says.
        kept: the user's own value stands instead of the rule's.
    """

    setting: str
    value: Any
    rule: Any
    reason: str
    kept: bool


@dataclass
class _Draft:
    plan: Plan
    pinned: frozenset[str]
    made: list[Decision] = field(default_factory=list)

    def given(self, setting: str) -> Any:
        section, _, name = setting.partition(".")
        part = getattr(self.plan, section)
        return part.parameters.get(name) if isinstance(part, Section) else getattr(part, name)

    def choose(self, setting: str, value: Any, reason: str) -> Any:
        """Decide a setting; returns what holds: the rule's value, or the user's."""
        kept = setting in self.pinned
        holds = self.given(setting) if kept else value
        if kept:
            reason = f"set on the command line; the rule would say {value}: {reason}"
        self.made.append(Decision(setting, holds, value, reason, kept))
        return holds


def plan_from(
    fingerprint: Fingerprint, plan: Plan, sites: int, *, pinned: Sequence[str] = (), memory_gb: float = 8.0
) -> tuple[Plan, list[Decision]]:
    """A plan for the data that `fingerprint` describes.

    Args:
        fingerprint: of all sites together.
        plan: what the rules do not decide comes from here.
        sites: how many sites train.
        pinned: settings that the user gave and that stay (`task.patch`).
        memory_gb: what a training step may take, in GB.
    """
    draft = _Draft(plan, frozenset(pinned))
    axes = _most(fingerprint.axes, "axes")
    if axes is None:
        return plan, [Decision("task", None, None, "no image in any fingerprint: nothing to go by", True)]
    spacing, shape = _grid(draft, fingerprint, int(axes))
    _intensities(draft, fingerprint)
    _network(draft, fingerprint, spacing, shape, sites, memory_gb * 1e9)
    return _with(plan, draft.made), draft.made


def _grid(draft: _Draft, f: Fingerprint, axes: int) -> tuple[list[float], list[float]]:
    """Target spacing (mm), and the median shape at it (voxels)."""
    spacing = [_median(f.spacing[a], "spacing") for a in range(axes)]
    shape = [_median(f.shape[a], "shape") for a in range(axes)]
    target, reason = list(spacing), "the median spacing of each axis: half of the images lose no detail"
    finest, coarsest = min(spacing), max(range(axes), key=lambda a: spacing[a])
    others = max((s for a, s in enumerate(spacing) if a != coarsest), default=finest)
    few = all(shape[coarsest] * ANISOTROPIC < n for a, n in enumerate(shape) if a != coarsest)
    if spacing[coarsest] > ANISOTROPIC * others and few:
        low = CELLS["spacing"].round_value(quantile(f.spacing[coarsest], 0.1) or 1)
        target[coarsest] = max(low, others)
        reason += (
            f"; axis {coarsest} is over {ANISOTROPIC:g} times coarser, so there the 10th percentile: "
            "resampling to the median would blur the images with thinner slices"
        )
    target = draft.choose("task.spacing", target, reason)
    if target is None or len(target) != axes:  # the user's: each image on its own grid
        return spacing, shape
    return target, [n * s / t for n, s, t in zip(shape, spacing, target, strict=True)]


def _intensities(draft: _Draft, f: Fingerprint) -> None:
    """Channels, and how intensities come to a common scale."""
    channels = _most(f.channels, "channels") or 1
    draft.choose("task.channels", int(channels), "what most images have")
    hu = float(f.units[1 + UNITS.index("HU")]) / max(1.0, float(f.units.sum()))
    row = f.foreground[0] if float(f.foreground[0, 1:].sum()) > 0 else f.intensity[0]
    if hu < 0.9:
        draft.choose(
            "task.normalise",
            "zscore",
            f"{1 - hu:.0%} of the patients have images without Hounsfield units: the same number means "
            "something else from scanner to scanner, so each image is scaled by its own mean and deviation",
        )
        return
    cells = CELLS["foreground"]
    low, high = (cells.value(quantile(row, q) or 1) for q in (0.005, 0.995))
    high = max(high, low + 1)  # HU: a foreground of one value
    mean, deviation = _moments(row, low, high)
    why = "Hounsfield units mean the same everywhere, so all images share fixed numbers"
    draft.choose("task.normalise", "fixed", why)
    draft.choose(
        "task.clip",
        [round(low, 1), round(high, 1)],
        "0.5th and 99.5th percentile of the foreground: beyond lie metal and air, which tell nothing here",
    )
    draft.choose("task.mean", round(mean, 2), "mean of the foreground between those, over all sites")
    draft.choose("task.deviation", round(deviation, 2), "its standard deviation")


def _network(
    draft: _Draft, f: Fingerprint, spacing: list[float], shape: list[float], sites: int, memory: float
) -> None:
    """Patch, depth, strides, widths and batch."""
    axes = len(shape)
    base = int((draft.given("model.channels") or [16])[0])
    halve = _halving(draft, spacing)
    patch, pools = _largest(shape, halve, base, memory)
    patch = draft.choose(
        "task.patch",
        patch,
        f"the median shape at that spacing is {'x'.join(f'{n:.0f}' for n in shape)}: as near to it as the "
        f"network's halvings and {memory / 1e9:g} GB allow, for a network sees no further than its patch",
    )
    if "task.patch" in draft.pinned and len(patch) == axes:
        twos = [(n & -n).bit_length() - 1 for n in patch]
        pools = [min(p, most) for p, most in zip(halve(patch), twos, strict=True)]
    if draft.plan.model.name in FREE:
        draft.choose(
            "model.channels",
            _widths(base, max(pools), axes),
            f"one level for each of {max(pools)} halvings, until the deepest map would have sides below "
            f"{SMALLEST}; widths double from {base} up to {WIDEST[axes]}",
        )
        draft.choose(
            "model.pools",
            pools,
            "each axis is halved while its side allows and its spacing is like the finest; one with fewer "
            "halvings has them at the deeper levels",
        )
    patients = f.patients / max(1, sites)
    size = _bytes(patch, _widths(base, max(pools), axes), pools)
    batch = max(2, min(math.floor(patients * BATCH_SHARE), math.floor(memory / size)))
    draft.choose(
        "local.batch_size",
        batch,
        f"at most {BATCH_SHARE:.0%} of a site's {patients:.0f} training patients, and what fits into memory, "
        f"but at least 2; {sites} sites step side by side, so that each step sees {batch * sites} patients",
    )


def _halving(draft: _Draft, spacing: Sequence[float]) -> Callable[[Sequence[float]], list[int]]:
    """How a patch of given sides is halved: by the rule, as far as network and user leave it open."""
    axes, name = len(spacing), draft.plan.model.name
    depth = len(draft.given("model.channels")) - 1 if "model.channels" in draft.pinned else 0
    pools = draft.given("model.pools") if "model.pools" in draft.pinned else []

    def halve(sides: Sequence[float]) -> list[int]:
        if name not in FREE:
            return [_FIXED] * axes
        if pools:
            return list(pools)
        made = topology(sides, spacing, depth or MOST_HALVINGS)
        if pools is None:  # the user wants every axis at every level
            made = [min(made)] * axes
        short = (depth or FREE[name]) - max(made)
        return [n + short for n in made] if depth or short > 0 else made

    return halve


def topology(sides: Sequence[float], spacing: Sequence[float], most: int = MOST_HALVINGS) -> list[int]:
    """Halvings per axis: while a side stays at `SMALLEST` or more, finest spacing first, `most` at most.

    An axis is halved together with the finest as soon as its spacing is within a factor of 2.
    """
    left, mm, pools = list(sides), list(spacing), [0] * len(sides)
    while max(pools) < most:
        able = [a for a, n in enumerate(left) if n / 2 >= SMALLEST]
        if not able:
            break
        finest = min(mm[a] for a in able)
        for a in able:
            if mm[a] < 2 * finest:
                left[a], mm[a], pools[a] = left[a] / 2, mm[a] * 2, pools[a] + 1
    return pools if max(pools) else [1] * len(sides)


def _largest(
    shape: list[float], halve: Callable[[Sequence[float]], list[int]], base: int, memory: float
) -> tuple[list[int], list[int]]:
    """The largest patch that fits, and its halvings: shrunk where it covers most of the median shape."""
    sides = list(shape)
    while True:
        pools = halve(sides)
        steps = [2**n for n in pools]
        patch = [max(1 if s == 1 else 2, round(n / s)) * s for n, s in zip(sides, steps, strict=True)]
        if 2 * _bytes(patch, _widths(base, max(pools), len(shape)), pools) <= memory:
            return patch, pools
        largest = max(range(len(patch)), key=lambda a: patch[a] / shape[a])
        if patch[largest] <= 2 * steps[largest]:
            return patch, pools
        sides[largest] = patch[largest] - steps[largest]


def _widths(base: int, halvings: int, axes: int) -> list[int]:
    return [min(base * 2**level, max(base, WIDEST[axes])) for level in range(halvings + 1)]


def _bytes(patch: Sequence[int], widths: Sequence[int], pools: Sequence[int]) -> float:
    """Estimate of what one example takes in training: the maps of all levels."""
    depth = max(pools)
    total = 0.0
    for level, width in enumerate(widths):
        halved = [max(0, level - (depth - n)) for n in pools]
        total += width * math.prod(n / 2**h for n, h in zip(patch, halved, strict=True))
    return 4 * _COPIES * total


def _most(row: Tensor, name: str) -> float | None:
    """The value of the fullest cell, `none` left out."""
    return CELLS[name].value(1 + int(row[1:].argmax())) if float(row[1:].sum()) > 0 else None


def _median(row: Tensor, name: str) -> float:
    return CELLS[name].round_value(quantile(row, 0.5) or 1)


def _moments(row: Tensor, low: float, high: float) -> tuple[float, float]:
    """Mean and standard deviation of a histogram cut at two values."""
    cells = CELLS["foreground"]
    values = [min(max(cells.value(c), low), high) for c in range(1, cells.size)]
    weights = row[1:].tolist()
    total = sum(weights)
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / total
    variance = sum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True)) / total
    return mean, max(math.sqrt(variance), 1.0)  # HU: no finer than the noise


def _with(plan: Plan, decisions: Sequence[Decision]) -> Plan:
    """The plan with what was decided, checked like any other."""
    tree: dict[str, dict[str, Any]] = plan.model_dump(mode="json")
    for one in decisions:
        section, _, name = one.setting.partition(".")
        if not one.kept:
            tree[section][name] = one.value
    return Plan.model_validate(tree)


def fragment(decisions: Sequence[Decision], patients: int, sites: int) -> str:
    """The decisions as a Hydra experiment, reasons as comments."""
    lines = [
        "# @package _global_",
        f"# From the fingerprint of {patients} training patients at {sites} sites.",
    ]
    sections: dict[str, list[Decision]] = {}
    for one in decisions:
        if "." in one.setting:
            sections.setdefault(one.setting.partition(".")[0], []).append(one)
    for section, of in sections.items():
        lines.append(f"{section}:")
        for one in of:
            name = one.setting.partition(".")[2]
            lines += [f"  # {one.reason}", f"  {name}: {json.dumps(one.value)}"]
    return "\n".join(lines) + "\n"


def as_json(decisions: Sequence[Decision]) -> list[Mapping[str, Any]]:
    """The decisions as plain values."""
    return [dict(vars(one)) for one in decisions]
