"""What guesses about canaries prove of ε, and what scores say of membership. Nothing but scipy.

The bound is that of Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846, theorem 5.2 and appendix D): whoever
guesses r of m independent coins from the output of an (ε, δ)-DP mechanism is right v times or more with
probability at most β + 2 m δ α, where β is the tail of a binomial of r trials at exp(ε) / (1 + exp(ε)).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats  # type: ignore[import-untyped]

Vector = NDArray[np.float64]

#: shares of the canaries that are guessed to be in and out; the level is divided among these choices. Few
#: guesses show a little leakage, many a lot; sampling can hide who is in, and then nobody is surely out
CHOICES = ((0.1, 0.0), (0.1, 0.1), (0.4, 0.4))
_FAR = 60.0  # beyond it exp(ε) / (1 + exp(ε)) is 1 in floating point


def p_value(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Probability, at most, of `v` or more right guesses of `r`, if the mechanism is (ε, δ)-DP.

    Args:
        m: canaries, each included with probability 1/2. r: guesses made. v: right ones.

    Raises:
        ValueError: not 0 <= v <= r <= m, ε < 0, or δ outside [0, 1].
    """
    if not 0 <= v <= r <= m or epsilon < 0 or not 0 <= delta <= 1:
        raise ValueError(
            f"m, r, v, epsilon, delta are {m, r, v, epsilon, delta}; need v <= r <= m, none below 0"
        )
    right = 1 / (1 + math.exp(-epsilon))
    tail = float(stats.binom.sf(v - 1, r, right))
    # the most that δ can move: an even share of the mass that lies up to i below v
    below = np.cumsum(stats.binom.pmf(np.arange(v - 1, -1, -1), r, right)) / np.arange(1, v + 1)
    return min(1.0, tail + 2 * m * delta * float(below.max(initial=0.0)))


def lower_bound(m: int, r: int, v: int, delta: float, level: float) -> float:
    """The ε below which so many right guesses have a probability under `level`; 0 where there is none."""

    def above(epsilon: float) -> float:
        return p_value(m, r, v, epsilon, delta) - level

    if r == 0 or above(0.0) >= 0:
        return 0.0
    if above(_FAR) < 0:
        return _FAR
    return float(optimize.brentq(above, 0.0, _FAR, xtol=1e-9))


@dataclass(frozen=True)
class Guessed:
    """The choice of guesses that proved most.

    Attributes:
        epsilon: the lower bound. high, low: canaries guessed to be in and out. right: right guesses.
    """

    epsilon: float
    high: int
    low: int
    right: int


def guess(scores: Vector, included: NDArray[np.bool_], delta: float, confidence: float = 0.95) -> Guessed:
    """Guess the highest scores in, and the lowest out or not at all; the best of several choices.

    The choices are fixed before the scores are seen and share the error, so that the best is a bound too.

    Args:
        scores, included: `m`.
    """
    m, order = len(scores), np.argsort(scores, kind="stable")
    found = []
    for high, low in ((int(up * m), int(down * m)) for up, down in CHOICES):
        right = int(included[order[m - high :]].sum() + (~included[order[:low]]).sum())
        epsilon = lower_bound(m, high + low, right, delta, (1 - confidence) / len(CHOICES))
        found.append(Guessed(epsilon, high, low, right))
    return max(found, key=lambda one: one.epsilon)


def deviation(values: Vector, level: float = 0.001) -> tuple[float, float, float]:
    """Standard deviation about 0 of normal values, and its interval (chi-squared) at 1 - `level`."""
    n, total = len(values), float(np.square(values).sum())
    low, high = stats.chi2.ppf([1 - level / 2, level / 2], n)
    return math.sqrt(total / n), math.sqrt(total / low), math.sqrt(total / high)


@dataclass(frozen=True)
class Attack:
    """How well scores tell members.

    Attributes:
        auroc, low, high: with its 95 % interval. tpr: share of the members found while at most `fpr` of
            the others is mistaken for one.
    """

    auroc: float
    low: float
    high: float
    tpr: float


def attack(members: Vector, others: Vector, fpr: float = 0.001) -> Attack:
    """Membership from scores, a patient each; higher means member.

    The interval is DeLong's (1988, Biometrics 44, 837-845), normal, and cut to [0, 1].

    Raises:
        ValueError: one side is empty.
    """
    if not len(members) or not len(others):
        raise ValueError(f"{len(members)} members and {len(others)} others; need one of each")
    of_member = _below(members, others)
    of_other = 1 - _below(others, members)
    auroc = float(of_member.mean())
    parts: Sequence[Vector] = (of_member, of_other)
    variance = sum(float(part.var(ddof=1)) / len(part) for part in parts if len(part) > 1)
    reach = float(stats.norm.ppf(0.975)) * math.sqrt(variance)
    threshold = np.sort(others)[::-1][int(fpr * len(others))]
    return Attack(
        auroc, max(0.0, auroc - reach), min(1.0, auroc + reach), float((members > threshold).mean())
    )


def _below(these: Vector, those: Vector) -> Vector:
    """For each of `these` the share of `those` below it, ties by half."""
    held = np.sort(those)
    counts = np.searchsorted(held, these, "left") + np.searchsorted(held, these, "right")
    shares: Vector = counts / (2 * len(held))
    return shares
