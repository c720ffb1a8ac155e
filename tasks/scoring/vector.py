"""What the statistics of all answers that are a vector share: one row for each patient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tasks.metrics import MISSING, Statistics, code, interval
from tasks.scoring.ranked import Ranking


def zeros(*shape: int) -> Tensor:
    """Float64, of that shape."""
    return torch.zeros(shape, dtype=torch.float64)


@dataclass(frozen=True)
class VectorStatistics(Statistics):
    """What the kinds share.

    Attributes:
        count: scalar, patients.
    """

    count: Tensor

    @property
    def patients(self) -> int:
        """How many patients were scored."""
        return round(float(self.count))

    @classmethod
    @abstractmethod
    def zero(cls, k: int) -> Self:
        """No patient, for `k` classes, labels or targets."""

    @classmethod
    def of_patient(cls, patient: str, truth: Tensor, given: Tensor) -> Self:
        """One patient's statistics.

        Args:
            patient: pseudonymous key.
            truth: `N` class indices, or `N x K` with NaN where missing. given: `N x K`; what is not a
                number there (a network that diverged) counts as 0.

        Raises:
            ValueError: shapes that do not go together, a truth that is no class, a probability beyond 0 to 1.
        """
        k = given.shape[-1]
        zero = cls.zero(k)
        truth, given = truth.cpu().double(), given.detach().cpu().double().nan_to_num(0, 0, 0)
        truth = truth.reshape(len(truth), -1)
        width = len(zero.columns) - 1 - k
        if given.ndim != 2 or truth.shape != (len(given), width):
            raise ValueError(
                f"truth is {tuple(truth.shape)}, given {tuple(given.shape)}; need N x {width}, N x K"
            )
        cls._check(truth, given, k)
        known = ~truth.isnan().all(1)
        if not bool(known.any()):
            return zero
        truth, given = _merged(truth[known], given[known])
        rows = torch.cat([torch.full((len(truth), 1), code(patient), dtype=torch.float64), truth, given], 1)
        one = torch.ones((), dtype=torch.float64)
        return replace(zero, count=one, **zero._of_rows(truth, given), rows=rows)

    @staticmethod
    def _check(truth: Tensor, given: Tensor, k: int) -> None:
        """Probabilities, and truths that are classes."""
        most = 1 if truth.shape[1] == k else k - 1
        wrong = (truth < 0) | (truth > most) | (truth != truth.floor())
        if bool((wrong & ~truth.isnan()).any()):
            raise ValueError(f"truth holds {truth[wrong & ~truth.isnan()][0]:g}; need 0 to {most}")
        if len(given) and not -1e-6 <= float(given.min()) <= float(given.max()) <= 1 + 1e-6:
            raise ValueError(f"a probability is {given.min():g} or {given.max():g}; need 0 to 1")

    @abstractmethod
    def _of_rows(self, truth: Tensor, given: Tensor) -> dict[str, Any]:
        """The sums over a patient's rows."""

    def _ranking(self, counts: Tensor, truth: int, given: int, positive: int) -> Ranking:
        """Of one column of the rows where all are there, else of the bins."""
        known = ~self.rows[:, truth].isnan()
        if int(known.sum()) != round(float(counts.sum())):
            return Ranking.of_bins(counts)
        return Ranking.of_scores(self.rows[known, given], self.rows[known, truth] == positive)


def _merged(truth: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of equal truth, averaged."""
    whole = np.unique(truth.nan_to_num(MISSING).numpy(), axis=0, return_inverse=True)
    distinct, where = (torch.from_numpy(part) for part in whole)
    sums = torch.zeros(len(distinct), given.shape[1], dtype=torch.float64).index_add(0, where, given)
    counts = torch.bincount(where, minlength=len(distinct)).double()
    return torch.where(distinct == MISSING, torch.nan, distinct), sums / counts[:, None]


def averaged(parts: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Every metric of every part as `<metric>_<k>`, and the mean over the parts that have it.

    The half widths of intervals are averaged too: never too narrow, whatever the parts have in common.
    """
    names: dict[str, list[float]] = {}
    found = {}
    for k, part in parts.items():
        for name, value in part.items():
            stem, _, end = name.rpartition("_")
            tail = f"_{end}" if end in ("lo", "hi", "bound") else ""
            found[f"{stem if tail else name}_{k}{tail}"] = value
            names.setdefault(name, []).append(value)
    whole = {
        n: v for n, v in names.items() if len(v) == len(names[n.removesuffix("_lo").removesuffix("_hi")])
    }
    return found | {name: sum(values) / len(values) for name, values in whole.items()}


def mean_of(name: str, total: Tensor, squares: Tensor, n: float) -> dict[str, float]:
    """A mean of non-negative values, with its interval from two of them on."""
    found = {name: float(total) / n}
    if n >= 2:
        half = interval(float(total), float(squares), n)
        found |= {f"{name}_lo": max(0.0, found[name] - half), f"{name}_hi": found[name] + half}
    return found
