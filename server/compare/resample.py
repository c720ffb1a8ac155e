"""Metrics of patients drawn anew, and what follows for the difference of two models.

A draw gives each patient a weight, how often it was drawn; a metric takes the weights of all draws at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t  # type: ignore[import-untyped]

Array = NDArray[np.float64]
Repeat = tuple[int, int]
"""`data.split_seed`, `seed`."""

DRAWS = 2000
_SEED = 20_240_229
_BLOCK = 4_000_000  # weights held at a time


@dataclass(frozen=True)
class Scored:
    """Patients' own scores, as a run keeps them.

    Attributes:
        columns: what a row holds: `patient`, then truths, probabilities or values.
        rows: `N x W`. site: `N` names of the sites where they were scored.
    """

    columns: tuple[str, ...]
    rows: Array
    site: NDArray[np.str_]

    @property
    def patients(self) -> Array:
        """Their codes."""
        return self.rows[:, 0]

    def only(self, chosen: NDArray[np.bool_]) -> Scored:
        """Some of the rows."""
        return Scored(self.columns, self.rows[chosen], self.site[chosen])

    def column(self, name: str) -> Array:
        """One column."""
        return self.rows[:, self.columns.index(name)]


Series = Mapping[Repeat, Scored]
"""A model's out-of-fold patients, in each repeat."""


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval, and how it was come by (`bootstrap`, `folds`)."""

    value: float
    low: float | None
    high: float | None
    method: str

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        known = self.value if np.isfinite(self.value) else None
        return {"value": known, "lo": self.low, "hi": self.high, "method": self.method}


def measured(metric: str, scored: Scored, weight: Array) -> Array | None:
    """A metric under `D x N` weights: `D` values, NaN where it has none; None: rows do not tell it."""
    if "truth" in scored.columns and metric in _CALLED:
        p = scored.rows[:, [i for i, c in enumerate(scored.columns) if c.startswith("p_")]]
        return _CALLED[metric](p, scored.column("truth").astype(int), weight)
    stem, _, last = metric.rpartition("_")
    if (ranked := _RANKED.get(metric) or _RANKED.get(stem)) is not None:
        parts = _parts(scored)
        wanted = parts if metric in _RANKED else parts.keys() & {last}
        both = [parts[k] for k in sorted(wanted) if len(set(parts[k][1].tolist())) == 2]
        found = [ranked(score, hit, weight[:, known]) for score, hit, known in both]
    else:
        names = {metric} if last != "mean" else {c for c in scored.columns if re.fullmatch(rf"{stem}_\d+", c)}
        values = [scored.column(c) for c in scored.columns if c in names]
        found = [_mean(v, weight) for v in values if not np.isnan(v).all()]
    return np.mean(found, axis=0) if found else None


def _parts(scored: Scored) -> dict[str, tuple[Array, NDArray[np.bool_], NDArray[np.bool_]]]:
    """Of each class (of two, the second) or label: scores, which are positives, and in which rows."""
    classes = "truth" in scored.columns
    every = [c[2:] for c in scored.columns if c.startswith("p_")]
    found = {}
    for k in every[1:] if classes and len(every) == 2 else every:
        truth, score = scored.column("truth" if classes else f"truth_{k}"), scored.column(f"p_{k}")
        known = ~np.isnan(truth)
        found[k] = score[known], truth[known] == (int(k) if classes else 1), known
    return found


def _tied(score: Array, hit: NDArray[np.bool_], weight: Array) -> tuple[Array, Array]:
    """Weights of positives and negatives at each distinct score, ascending: `D x G`."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0])
    weight = weight[:, order]
    hits: Array = np.add.reduceat(weight * hit[order], starts, axis=1)
    return hits, np.add.reduceat(weight * ~hit[order], starts, axis=1)


def _auroc(score: Array, hit: NDArray[np.bool_], weight: Array) -> Array:
    positive, negative = _tied(score, hit, weight)
    below: Array = negative.cumsum(1) - negative / 2
    return _ratio((positive * below).sum(1), positive.sum(1) * negative.sum(1))


def _ap(score: Array, hit: NDArray[np.bool_], weight: Array) -> Array:
    positive, negative = (part[:, ::-1] for part in _tied(score, hit, weight))
    found = positive.cumsum(1)
    precision = np.nan_to_num(_ratio(found, found + negative.cumsum(1)))
    return _ratio((positive * precision).sum(1), positive.sum(1))


def _accuracy(p: Array, truth: NDArray[np.int_], weight: Array) -> Array:
    return _ratio(weight @ (p.argmax(1) == truth), weight.sum(1))


def _balanced_accuracy(p: Array, truth: NDArray[np.int_], weight: Array) -> Array:
    right = (p.argmax(1) == truth).astype(float)
    recalls = [_mean(np.where(truth == k, right, np.nan), weight) for k in np.unique(truth)]
    return np.asarray(np.mean(recalls, axis=0))


def _brier(p: Array, truth: NDArray[np.int_], weight: Array) -> Array:
    off = ((p - np.eye(p.shape[1])[truth]) ** 2).sum(1)
    return _mean(off / (2 if p.shape[1] == 2 else 1), weight)


def _mean(values: Array, weight: Array) -> Array:
    known = ~np.isnan(values)
    return _ratio(weight @ np.where(known, values, 0.0), weight @ known)


def _ratio(above: Array, below: Array) -> Array:
    """NaN where there is nothing to divide by."""
    found: Array = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=below > 0)
    return found


_RANKED = {"auroc": _auroc, "ap": _ap}
_CALLED: dict[str, Callable[[Array, NDArray[np.int_], Array], Array]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "brier": _brier,
}


def over_repeats(metric: str, series: Series, weights: Mapping[Repeat, Array] | None = None) -> Array | None:
    """The mean over repeats of the metric of each one's patients together; without weights: of all, once."""
    found = []
    for repeat, scored in series.items():
        if not len(scored.rows):
            continue
        weight = np.ones((1, len(scored.rows))) if weights is None else weights[repeat]
        value = measured(metric, scored, weight)
        if value is None:
            return None
        found.append(value)
    return np.asarray(np.mean(found, axis=0)) if found else None


def own(metric: str, series: Series) -> Interval | None:
    """The metric of all out-of-fold patients, by the bootstrap over patients."""
    value = over_repeats(metric, series)
    return None if value is None else _between(float(value[0]), _drawn(metric, [series])[0])


def difference(metric: str, one: Series, other: Series) -> Interval | None:
    """One model minus another on the patients both have, by the paired bootstrap.

    Patients are drawn once for both models and all repeats.
    """
    pairs = {r: _common(one[r], other[r]) for r in one if r in other}
    ours, theirs = ({r: pair[i] for r, pair in pairs.items()} for i in (0, 1))
    values = [over_repeats(metric, series) for series in (ours, theirs)]
    if values[0] is None or values[1] is None:
        return None
    first, second = _drawn(metric, [ours, theirs])
    return _between(float(values[0][0] - values[1][0]), first - second)


def _common(one: Scored, other: Scored) -> tuple[Scored, Scored]:
    both = np.intersect1d(one.patients, other.patients)
    return one.only(np.isin(one.patients, both)), other.only(np.isin(other.patients, both))


def _drawn(metric: str, all_series: Sequence[Series]) -> list[Array]:
    """The metric of each series in each draw."""
    patients = np.unique(np.concatenate([s.patients for series in all_series for s in series.values()]))
    found: list[list[Array]] = [[] for _ in all_series]
    for counts in _draws(len(patients)):
        for series, values in zip(all_series, found, strict=True):
            weights = {r: counts[:, np.searchsorted(patients, s.patients)] for r, s in series.items()}
            value = over_repeats(metric, series, weights)
            if value is not None:
                values.append(value)
    return [np.concatenate(values) for values in found]


def _draws(patients: int) -> Iterator[Array]:
    """How often each patient is drawn: `D x patients` at a time, `DRAWS` in all."""
    random = np.random.default_rng(_SEED)
    size = max(1, _BLOCK // max(patients, 1))
    for first in range(0, DRAWS, size):
        share = np.full(patients, 1 / patients)
        yield random.multinomial(patients, share, size=min(size, DRAWS - first)).astype(np.float64)


def _between(value: float, drawn: Array) -> Interval:
    """The percentile interval; none from fewer than half of the draws (a class may be missing in one)."""
    known = drawn[np.isfinite(drawn)]
    if len(known) < DRAWS / 2:
        return Interval(value, None, None, "bootstrap")
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(value, float(low), float(high), "bootstrap")


def by_folds(values: Sequence[float], folds: int) -> Interval:
    """The mean of a value per fold, with the corrected interval of Nadeau and Bengio (2003), section 3.

    The variance over J folds of all repeats is multiplied by 1/J + 1/(folds - 1): training sets overlap.
    Needs two values and a cross-validation; otherwise there is no interval.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2 or folds < 2:
        return Interval(mean, None, None, "folds")
    half = t.ppf(0.975, count - 1) * np.std(values, ddof=1) * (1 / count + 1 / (folds - 1)) ** 0.5
    return Interval(mean, float(mean - half), float(mean + half), "folds")
