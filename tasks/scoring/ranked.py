"""Ranks of positives and negatives: AUROC, average precision, sensitivity, from exact scores or from bins.

Both come down to the same thing, positives and negatives counted at ascending scores; scores that share a bin
are ties that may not be any. How far that can move a value is known, and stands beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import digamma  # type: ignore[import-untyped]
from torch import Tensor

from tasks.metrics import Z95

BINS = 1000
_REACH = 16.0  # logits; a float32 just below 1 has 16.6


def bins(scores: Tensor) -> Tensor:
    """The bin of each score in [0, 1], even in the logit: confident scores lie close together near 0 and 1.

    The first and the last bin hold exactly 0 and 1, so those ties are true ones.
    """
    wide = BINS - 2
    inner = ((scores.logit() + _REACH) / (2 * _REACH) * wide).clamp(0, wide - 1).floor().long() + 1
    return torch.where(scores <= 0, 0, torch.where(scores >= 1, BINS - 1, inner))


def histogram(scores: Tensor, positive: Tensor) -> Tensor:
    """Counts of negatives and positives over the bins: `2 x BINS` float64."""
    cells = positive.long() * BINS + bins(scores.double())
    return torch.bincount(cells, minlength=2 * BINS).view(2, BINS).double()


@dataclass(frozen=True)
class Ranking:
    """Counts at ascending scores.

    Attributes:
        negatives, positives: float64, one per score or bin. exact: whether a tie is one.
    """

    negatives: Tensor
    positives: Tensor
    exact: bool

    @classmethod
    def of_scores(cls, scores: Tensor, positive: Tensor) -> Ranking:
        """From every score."""
        distinct, where = (torch.from_numpy(a) for a in np.unique(scores.numpy(), return_inverse=True))
        counts = torch.bincount(positive.long() * len(distinct) + where, minlength=2 * len(distinct))
        negatives, positives = counts.view(2, -1).double()
        return cls(negatives, positives, exact=True)

    @classmethod
    def of_bins(cls, counts: Tensor) -> Ranking:
        """From a histogram (noise may have made counts negative)."""
        negatives, positives = counts.clamp_min(0)
        return cls(negatives, positives, exact=False)

    def value(self, specificity: float = 0.9) -> dict[str, float]:
        """`auroc`, `ap`, their `_lo`, `_hi`, `_bound`, and `sensitivity_at_90`; empty without both kinds.

        `_bound`: how far the value may be off the one of the exact scores; `_lo` and `_hi` allow for it.
        """
        n, p = float(self.negatives.sum()), float(self.positives.sum())
        if n < 1 or p < 1:
            return {}
        found = self._auroc(n, p) | self._precision(p)
        share = self.negatives.flip(0).cumsum(0) / n  # called positive at or above each score
        reached = self.positives.flip(0).cumsum(0)[share <= 1 - specificity + 1e-12]
        found[f"sensitivity_at_{specificity * 100:.0f}"] = float(reached[-1]) / p if len(reached) else 0.0
        return found

    def _auroc(self, n: float, p: float) -> dict[str, float]:
        below = self.negatives.cumsum(0) - self.negatives
        ties = float(self.positives @ self.negatives) / (2 * n * p)
        auroc = min(1.0, float(self.positives @ below) / (n * p) + ties)
        bound = 0.0 if self.exact else ties
        # the ends rise with the value: these hold the interval of the exact one
        low, _ = auroc_interval(max(0.0, auroc - bound), n, p)
        _, high = auroc_interval(min(1.0, auroc + bound), n, p)
        return {"auroc": auroc, "auroc_lo": low, "auroc_hi": high, "auroc_bound": bound}

    def _precision(self, p: float) -> dict[str, float]:
        """Average precision as a sum over steps, and its interval (Boyd et al. 2013, logit)."""
        gained = self.positives.flip(0)
        above = gained.cumsum(0)
        wrong = self.negatives.flip(0).cumsum(0)
        ap = float((gained * above / (above + wrong).clamp_min(1e-300)).sum()) / p
        bound = 0.0
        if not self.exact:
            least, most = _extremes(gained, above, self.negatives.flip(0), wrong)
            bound = max(ap - least / p, most / p - ap)
        found = {"ap": ap, "ap_bound": bound}
        if 0 < ap < 1:
            middle, half = math.log(ap / (1 - ap)), Z95 / math.sqrt(p * ap * (1 - ap))
            found["ap_lo"] = max(0.0, _expit(middle - half) - bound)
            found["ap_hi"] = min(1.0, _expit(middle + half) + bound)
        return found


def _extremes(gained: Tensor, above: Tensor, lost: Tensor, wrong: Tensor) -> tuple[float, float]:
    """The sum of precisions at least and at most, whatever the order within each bin.

    At most all positives of a bin come before its negatives, at one score; at least they come last, one by
    one: sum over i = 1..p of (a + i) / (a + i + w) = p - w (psi(a + p + w + 1) - psi(a + w + 1)).
    """
    before = above - gained
    most = gained * above / (above + wrong - lost).clamp_min(1e-300)
    rise = torch.from_numpy(digamma((above + wrong + 1).numpy()) - digamma((before + wrong + 1).numpy()))
    least = gained - wrong * rise
    return float(least.sum()), float(most.sum())


def auroc_interval(auroc: float, n: float, p: float) -> tuple[float, float]:
    """95 % interval of an AUROC from `n` negatives and `p` positives.

    The score interval on Hanley and McNeil's variance, which keeps a width where the AUROC is 1 (Newcombe,
    Statistics in Medicine 25:559, 2006, method 5).
    """

    def outside(t: float) -> bool:
        extra = (n + p) / 2 - 1
        spread = t * (1 - t) * (1 + extra * (1 - t) / (2 - t) + extra * t / (1 + t)) / (n * p)
        return (auroc - t) ** 2 > Z95**2 * spread

    ends = []
    for far in (0.0, 1.0):
        near, away = auroc, far
        for _ in range(60):
            middle = (near + away) / 2
            near, away = (near, middle) if outside(middle) else (middle, away)
        ends.append((near + away) / 2)
    return ends[0], ends[1]


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x))
