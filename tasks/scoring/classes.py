"""Statistics of predicted classes, labels, grades and numbers: what a case-to-vector task sums.

By kind of target:

    KINDS["classes"].zero(K)      of_patient(patient, truth N, given N x K)      K classes, 2 for binary
    KINDS["ordinal"].zero(K)      of_patient(patient, truth N, given N x K)      ordered classes 0 to K - 1
    KINDS["multilabel"].zero(K)   of_patient(patient, truth N x K, given N x K)  0, 1, NaN = missing
    KINDS["continuous"].zero(K)   of_patient(patient, truth N x K, given N x K)  NaN = missing

`patient` is the case's pseudonymous key, N the patient's cases, `given` probabilities (or numbers). Cases of
one patient with equal truth are averaged to one row first: the patient is the unit, and one with two truths
(an eye each) counts as two rows. All values are exact on pooled data, but for ranks (AUROC, average
precision): exact while the rows are there, else from bins, with the bound on the error beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from tasks.scoring.ranked import BINS, histogram
from tasks.scoring.rates import CONFIDENCES, calibration, calibration_error, of_confusion, quadratic_kappa
from tasks.scoring.values import ValueStatistics
from tasks.scoring.vector import VectorStatistics, averaged, mean_of, zeros

MOST_CONFUSED = 16
"""A confusion matrix of more classes is not told cell by cell."""


@dataclass(frozen=True)
class ClassStatistics(VectorStatistics):
    """One class of K for each row.

    Attributes:
        having: K, patients with a row of each class.
        ranks: `R x 2 x BINS`, negatives and positives by score: of class 1 alone where there are two.
        confusion: `K x K`, truth by rows. confidence: `CONFIDENCES x 3`, see `calibration`.
        brier, brier_squared: sums over rows of the score (halved where there are two classes) and its square.
    """

    having: Tensor
    ranks: Tensor
    confusion: Tensor
    confidence: Tensor
    brier: Tensor
    brier_squared: Tensor

    @property
    def columns(self) -> tuple[str, ...]:
        """`patient`, `truth`, `p_0`, …"""
        return ("patient", "truth", *(f"p_{k}" for k in range(len(self.having))))

    @classmethod
    def zero(cls, k: int) -> Self:
        """No patient, for `k` classes."""
        return cls(
            count=zeros(),
            having=zeros(k),
            ranks=zeros(1 if k == 2 else k, 2, BINS),
            confusion=zeros(k, k),
            confidence=zeros(CONFIDENCES, 3),
            brier=zeros(),
            brier_squared=zeros(),
            rows=zeros(0, 2 + k),
        )

    @property
    def _ranked(self) -> range:
        k = len(self.having)
        return range(1, 2) if k == 2 else range(k)

    def _of_rows(self, truth: Tensor, given: Tensor) -> dict[str, Any]:
        k = given.shape[1]
        true = truth[:, 0].long()
        top, said = given.max(1)
        hot = torch.nn.functional.one_hot(true, k).double()
        brier = (given - hot).square().sum(1) / (2 if k == 2 else 1)
        return {
            "having": hot.amax(0),
            "ranks": torch.stack([histogram(given[:, i], true == i) for i in self._ranked]),
            "confusion": torch.bincount(true * k + said, minlength=k * k).view(k, k).double(),
            "confidence": calibration(top, said == true),
            "brier": brier.sum(),
            "brier_squared": brier.square().sum(),
        }

    def bounds(self) -> dict[str, float]:
        """Of a patient with one row; who has more is scaled down. No calibration: its many bins drown."""
        leave = {"count": 1.0, "ranks": len(self._ranked) ** 0.5, "confusion": 1.0, "brier": 1.0}
        return {name: leave.get(name, 0.0) for name in self.sums()}

    def cells(self) -> Tensor:
        """Patients, and patients of each class."""
        return torch.cat([self.count[None], self.having])

    def value(self) -> dict[str, float]:
        """Of two classes `auroc`, `ap`, `sensitivity_at_90` of class 1; of more one per class against the
        rest (`auroc_<k>`), and their mean. `accuracy`, `balanced_accuracy`, `f1`, `brier`, `ece`,
        `confusion_<truth>_<said>`.
        """
        found: dict[str, float] = {}
        ranked = {
            k: self._ranking(counts, 1, 2 + k, k).value()
            for k, counts in zip(self._ranked, self.ranks, strict=True)
        }
        found |= ranked[1] if len(self.having) == 2 else averaged(ranked)
        n = float(self.confusion.sum())
        if n < 1:
            return found
        found |= of_confusion(self.confusion) | calibration_error(self.confidence)
        found |= mean_of("brier", self.brier, self.brier_squared, n)
        if len(self.having) <= MOST_CONFUSED:
            for i, row in enumerate(self.confusion.tolist()):
                found |= {f"confusion_{i}_{j}": cell for j, cell in enumerate(row)}
        return found


@dataclass(frozen=True)
class OrdinalStatistics(ClassStatistics):
    """Classes in order: how far off, too."""

    def value(self) -> dict[str, float]:
        """As of classes, and `kappa_quadratic`, `mae` (in grades, of the likeliest class)."""
        found = super().value()
        n = float(self.confusion.sum())
        if n < 1:
            return found
        grade = torch.arange(len(self.having), dtype=torch.float64)
        off = (grade[:, None] - grade).abs()
        found |= quadratic_kappa(self.confusion)
        return found | mean_of("mae", (self.confusion * off).sum(), (self.confusion * off**2).sum(), n)


@dataclass(frozen=True)
class LabelStatistics(VectorStatistics):
    """K labels, each there or not, or nobody knows.

    Attributes:
        having: `K x 2`, patients without and with each label.
        ranks: `K x 2 x BINS`. confusion: `K x 2 x 2`, called at 0.5. confidence: `K x CONFIDENCES x 3`.
        brier, brier_squared: K, sums over the rows where the label is known.
    """

    having: Tensor
    ranks: Tensor
    confusion: Tensor
    confidence: Tensor
    brier: Tensor
    brier_squared: Tensor

    @property
    def columns(self) -> tuple[str, ...]:
        """`patient`, `truth_0`, …, `p_0`, …"""
        labels = range(len(self.having))
        return ("patient", *(f"truth_{k}" for k in labels), *(f"p_{k}" for k in labels))

    @classmethod
    def zero(cls, k: int) -> Self:
        """No patient, for `k` labels."""
        return cls(
            count=zeros(),
            having=zeros(k, 2),
            ranks=zeros(k, 2, BINS),
            confusion=zeros(k, 2, 2),
            confidence=zeros(k, CONFIDENCES, 3),
            brier=zeros(k),
            brier_squared=zeros(k),
            rows=zeros(0, 1 + 2 * k),
        )

    def _of_rows(self, truth: Tensor, given: Tensor) -> dict[str, Any]:
        made: dict[str, list[Tensor]] = {}
        for t, p in zip(truth.T, given.T, strict=True):
            known = ~t.isnan()
            true, score = t[known].long(), p[known]
            said = score >= 0.5
            brier = (score - true).square()
            parts = {
                "having": torch.stack([(true == 0).any(), (true == 1).any()]).double(),
                "ranks": histogram(score, true == 1),
                "confusion": torch.bincount(true * 2 + said.long(), minlength=4).view(2, 2).double(),
                "confidence": calibration(torch.where(said, score, 1 - score), said == (true == 1)),
                "brier": brier.sum(),
                "brier_squared": brier.square().sum(),
            }
            for name, part in parts.items():
                made.setdefault(name, []).append(part)
        return {name: torch.stack(parts) for name, parts in made.items()}

    def bounds(self) -> dict[str, float]:
        """Of a patient with one row in whom every label is known; who has more is scaled down."""
        labels = len(self.having) ** 0.5
        leave = {"count": 1.0, "ranks": labels, "confusion": labels, "brier": labels}
        return {name: leave.get(name, 0.0) for name in self.sums()}

    def cells(self) -> Tensor:
        """Patients, and patients without and with each label."""
        return torch.cat([self.count[None], self.having.flatten()])

    def value(self) -> dict[str, float]:
        """Each metric per label (`auroc_<k>`), over the patients in whom it is known, and the mean."""
        k = len(self.having)
        parts = {}
        for i in range(k):
            n = float(self.confusion[i].sum())
            parts[i] = self._ranking(self.ranks[i], 1 + i, 1 + k + i, 1).value()
            if n >= 1:
                parts[i] |= of_confusion(self.confusion[i]) | calibration_error(self.confidence[i])
                parts[i] |= mean_of("brier", self.brier[i], self.brier_squared[i], n)
        return averaged(parts)


KINDS: Mapping[str, type[VectorStatistics]] = {
    "classes": ClassStatistics,
    "ordinal": OrdinalStatistics,
    "multilabel": LabelStatistics,
    "continuous": ValueStatistics,
}
