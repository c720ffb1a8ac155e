"""What releases cost together: (ε, δ) of everything that was said about one population of patients.

An `Entry` says what was done (σ, q, steps), never what it cost: costs do not add, so ε is computed over all
entries at once. Two methods: `prv` is what is approved and reported (Gopi et al. 2021, arXiv:2106.02848, in
Opacus, which brings torch and is imported on first use); `rdp` is an upper bound in microseconds, without
torch, for each reservation. Gaussian DP's central limit is refused: it is up to 46 % too low.

The unit is a patient, neighbours differ by one patient more or less, sampling is Poisson. `replace_one` is
the same for one patient in another's place. No amplification by sampling of *sites* is claimed: the
coordinator sees who takes part.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

#: below it a step hides nothing, and the bounds here say so instead of computing it
LEAST_SIGMA = 0.05
#: orders of Rényi's divergence: fractional first, then whole numbers
_PARTS = np.arange(11, 110) / 10.0
_WHOLES = np.array([*range(11, 64), 72, 80, 96, 128, 192, 256, 512, 1024], dtype=np.float64)
ORDERS: Vector = np.concatenate([_PARTS, _WHOLES])
#: PRV's grid grows with ε; beyond this the number says no more than "no privacy", and RDP says that too
_FAR = 200.0
#: points of its grid (a dozen arrays of them are 2 GB)
_GRID = 2**24
#: the largest σ that is tried, in thousandths
_MOST = 10_000_000


@dataclass(frozen=True, order=True)
class Entry:
    """Equal Gaussian releases about a population of patients.

    Attributes:
        sigma: standard deviation of the noise, in units of what one patient can move (C). q: each patient's
            chance to take part in a step (Poisson); 1 = all. steps: how many. unit: whose privacy.
    """

    sigma: float
    q: float
    steps: int
    mechanism: str = "gaussian"
    unit: str = "patient"

    def __post_init__(self) -> None:
        if self.mechanism != "gaussian":
            raise ValueError(f"mechanism is {self.mechanism!r}; every release is gaussian")
        if self.unit != "patient":
            raise ValueError(f"unit is {self.unit!r}; it is patient: slices and crops are not independent")
        for name in ("sigma", "q"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, float | int) or not math.isfinite(value):
                raise ValueError(f"{name} is {value!r}; need a finite number")
            object.__setattr__(self, name, float(value))  # 1 and 1.0 are one kind of release
        if self.sigma < 0:
            raise ValueError(f"sigma is {self.sigma}; need at least 0")
        if not 0 < self.q <= 1:
            raise ValueError(f"q is {self.q}; need more than 0 and at most 1")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 1 <= self.steps <= 10**9:
            raise ValueError(f"steps is {self.steps!r}; need a whole number from 1 to 1000000000")


def merged(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The same releases, equal ones as one entry: the order they were made in does not count."""
    steps: Counter[tuple[float, float]] = Counter()
    for entry in entries:
        steps[entry.sigma, entry.q] += entry.steps
    return tuple(sorted(Entry(sigma, q, n) for (sigma, q), n in steps.items()))


def epsilon(entries: Iterable[Entry], delta: float, accountant: str = "prv") -> float:
    """ε of all entries together.

    Args:
        accountant: `prv` (for what is approved and reported) or `rdp` (fast upper bound).

    Raises:
        ValueError: another accountant; `delta` outside (0, 1).
    """
    if accountant == "prv":
        return prv(entries, delta)
    if accountant == "rdp":
        return rdp(entries, delta)
    why = "; gdp is an approximation and up to 46 % too low" if accountant == "gdp" else ""
    raise ValueError(f"accountant is {accountant!r}; known: prv, rdp{why}")


def rdp(entries: Iterable[Entry], delta: float) -> float:
    """An upper bound of ε, by Rényi DP. No torch."""
    return rdp_epsilon(sum((e.steps * curve(e.sigma, e.q) for e in merged(entries)), nothing()), delta)


def nothing() -> Vector:
    """The Rényi divergences of no release."""
    return np.zeros_like(ORDERS)


@lru_cache(maxsize=256)
def curve(sigma: float, q: float) -> Vector:
    """Rényi divergence of one step of the sampled Gaussian, at each of `ORDERS`.

    log A(α) / (α - 1), where A(α) is the mean of the α-th power of the densities' ratio
    (Mironov, Talwar, Zhang 2019, arXiv:1908.10530, section 3).
    """
    if sigma < LEAST_SIGMA:
        return np.full_like(ORDERS, np.inf)
    if q == 1:
        return ORDERS / (2 * sigma**2)
    log_a = np.concatenate([_by_quadrature(sigma, q, _PARTS), _by_binomial(sigma, q, _WHOLES)])
    # rounding may not turn a cost into a gain
    found: Vector = np.maximum(log_a, 0) / (ORDERS - 1)
    found.setflags(write=False)
    return found


def rdp_epsilon(divergences: Vector, delta: float) -> float:
    """ε at δ from divergences at `ORDERS` (Balle et al. 2020, arXiv:1905.09982, theorem 21)."""
    _check_delta(delta)
    if not divergences.any():
        return 0.0
    a = ORDERS
    bounds = divergences - (math.log(delta) + np.log(a)) / (a - 1) + np.log1p(-1 / a)
    return max(0.0, float(bounds.min()))


def prv(entries: Iterable[Entry], delta: float) -> float:
    """ε of all entries together, by privacy loss random variables: Opacus' upper bound.

    It lies 0.010 to 0.0107 above the exact value. Where Opacus cannot compute it (no noise, far beyond any
    protection, billions of steps, too small a δ), the bound by Rényi DP is the answer: it is above too.
    """
    _check_delta(delta)
    parts = merged(entries)
    if not parts:
        return 0.0
    bound = rdp(parts, delta)
    if bound > _FAR or _points(parts, bound, delta) > _GRID:
        return bound
    from opacus.accountants import PRVAccountant  # type: ignore[import-untyped]  # it brings torch

    accountant: Any = PRVAccountant()
    accountant.history = [(e.sigma, e.q, e.steps) for e in parts]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # q = 1, and orders at the end of Opacus' range
        try:
            found = float(accountant.get_epsilon(delta=delta))
        except (ValueError, RuntimeError, ArithmeticError, MemoryError):
            return bound
    return found if math.isfinite(found) else bound


def _points(parts: Iterable[Entry], bound: float, delta: float) -> float:
    """About how many points PRV's grid has: an error of 0.01 in ε, shared out over all steps."""
    steps = sum(e.steps for e in parts)
    return 200 * (bound + 3) * math.sqrt(steps * math.log(12_000 / delta) / 2)


def replace_one(entries: Iterable[Entry], delta: float) -> float:
    """ε where one patient's data stand in another's place.

    It is one patient less, then one more: two add/remove steps at ε' and δ' give 2ε' at
    δ' (1 + exp(ε')) (group privacy: Vadhan 2017, The Complexity of Differential Privacy, lemma 2.2). An upper
    bound for any mechanism.
    """
    _check_delta(delta)
    parts = merged(entries)
    if not parts:
        return 0.0
    if rdp(parts, delta) > _FAR:
        return math.inf

    def once(log_delta: float) -> float:
        return min(rdp(parts, math.exp(log_delta)), prv(parts, math.exp(log_delta)))

    # a δ' that serves RDP's ε' serves the least one, and from there each step leads to a larger δ' that does
    found = _bisect(lambda x: float(np.logaddexp(0, rdp(parts, math.exp(x)))) + x, math.log(delta))
    for _ in range(2):
        found = math.log(delta) - float(np.logaddexp(0, once(found)))
    return 2 * once(found)


def calibrate(target: float, delta: float, steps: int, q: float, behind: Iterable[Entry] = ()) -> float:
    """The least σ (to 0.001, rounded up) whose `steps` stay within `target` together with what lies behind.

    Args:
        target: ε by PRV. behind: entries already spent on the same patients.

    Raises:
        ValueError: what lies behind has used `target` up, or no σ up to 10,000 is enough.
    """
    if not target > 0:
        raise ValueError(f"epsilon is {target}; need more than 0")
    past = merged(behind)

    def enough(method: Callable[[Iterable[Entry], float], float], thousandths: int) -> bool:
        return method([*past, Entry(thousandths / 1000, q, steps)], delta) <= target

    if not enough(prv, _MOST):
        used = f", {prv(past, delta):.4f} is used" if past else ""
        raise ValueError(f"no sigma up to {_MOST // 1000} keeps {steps} steps at q={q} within {target}{used}")
    # the fast bound's σ is a little too large, so the search by PRV is a short one
    near = _least(lambda n: enough(rdp, n), 0, _MOST)
    high = near if enough(prv, near) else _MOST
    low = high * 3 // 4
    while low and enough(prv, low):
        low, high = low * 3 // 4, low
    return _least(lambda n: enough(prv, n), low, high) / 1000


def across(sites: Mapping[str, float], overlaps: Iterable[Iterable[str]] = ()) -> float:
    """ε of a patient over a federation, each site's ε given.

    Disjoint sites: the largest, for a patient is at one of them. Overlaps: a patient may be at all the sites
    of a group, and what was said of them there adds (so does δ).

    Raises:
        ValueError: an overlap names a site that is not there.
    """
    groups = [frozenset(group) for group in overlaps]
    if other := sorted(frozenset[str]().union(*groups) - set(sites)):
        raise ValueError(f"overlaps name {', '.join(other)}; sites are {', '.join(sorted(sites))}")
    # groups that share a site may share a patient
    joined: list[frozenset[str]] = []
    for group in groups:
        touching = [other for other in joined if other & group]
        joined = [other for other in joined if not other & group] + [group.union(*touching)]
    sums = [math.fsum(sites[name] for name in group) for group in joined]
    return max([*sites.values(), *sums], default=0.0)


def _by_quadrature(sigma: float, q: float, orders: Vector) -> Vector:
    """log A at any orders: the trapezoid rule, which converges faster than any power here.

    The integrand is analytic up to poles at distance πσ² from the real line.
    """
    step = min(sigma / 8, sigma**2 / 2)
    z = np.arange(-14 * sigma, orders.max() + 14 * sigma, step)
    log_density = -(z**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    log_ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * z - 1) / (2 * sigma**2))
    return _log_sum(log_density + orders[:, None] * log_ratio) + math.log(step)


def _by_binomial(sigma: float, q: float, orders: Vector) -> Vector:
    """log A at whole orders: a sum of positive terms (section 3.3)."""
    k = np.arange(orders.max() + 1)
    factorial = np.concatenate([[0.0], np.cumsum(np.log(k[1:]))])  # log k!
    a = orders.astype(np.int64)[:, None]
    rest = np.maximum(a - k.astype(np.int64), 0)
    terms = (
        factorial[a]
        - factorial[None, :]
        - factorial[rest]
        + k * math.log(q)
        + rest * math.log1p(-q)
        + (k * k - k) / (2 * sigma**2)
    )
    return _log_sum(np.where(k <= orders[:, None], terms, -np.inf))


def _log_sum(terms: Vector) -> Vector:
    top = terms.max(axis=1)
    summed: Vector = top + np.log(np.exp(terms - top[:, None]).sum(axis=1))
    return summed


def _least(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The least whole number above `low` that fits, if `high` does and all above one that fits."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _bisect(rising: Callable[[float], float], target: float) -> float:
    """The largest x below `target` (within 0.01) with rising(x) ≤ target."""
    low, high = target - 1, target
    while rising(low) > target:
        low, high = 2 * low, low
        if low < -700:
            return -700.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) <= target else (low, middle)
    return low


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise ValueError(f"delta is {delta}; need more than 0 and less than 1")
