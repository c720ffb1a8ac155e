"""Linear heads on fixed features, learned by exact sums: what a network on images has to beat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.base import Case, Prediction, Summed, Sums
from tasks.targets import Target


@dataclass(frozen=True)
class Prior(Summed):
    """The mean of the training cases, for every case."""

    target: Target

    def zero(self) -> Sums:
        """Values and how many are known: `fits` each."""
        none = torch.zeros(self.target.fits, dtype=torch.float64)
        return {"values": none, "known": none}

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """This case's values."""
        values = self.target.regressors(case)
        return {"values": values.nan_to_num(0), "known": (~values.isnan()).double()}

    def cells(self, part: Sums) -> Tensor:
        """A mean for each value."""
        return part["known"]

    def predict(self, known: Sums, case: Case) -> Prediction:
        """The mean."""
        mean = known["values"] / known["known"].clamp_min(1)
        return Prediction(scores={"given": self.target.bounded(mean)})


@dataclass(frozen=True)
class Ridge(Summed):
    """Least squares with a penalty on the weights, one exchange (Hoerl and Kennard, 1970).

    Each of several labels has its own products: those of the cases in which it is known.

    Attributes:
        features: a case's, `F` numbers. size: F.
        penalty: λ, in units of the mean square of a feature times the number of cases.
    """

    target: Target
    features: Callable[[Case], Tensor]
    size: int
    penalty: float = 1.0

    @property
    def products(self) -> int:
        return self.size

    @property
    def _grams(self) -> int:
        return 1 if self.target.single else self.target.fits

    def cells(self, part: Sums) -> Tensor:
        """Products for all values, or for each."""
        return part["gram"].flatten(1).any(1).double()

    def zero(self) -> Sums:
        """Products of features (with a one behind them) with each other and with the values."""
        n, k = self.size + 1, self.target.fits
        return {
            "gram": torch.zeros((self._grams, n, n), dtype=torch.float64),
            "moment": torch.zeros((n, k), dtype=torch.float64),
        }

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """This case's products."""
        values = self.target.regressors(case)
        x = _with_one(self.features(case))
        there = (~values.isnan()).double()[: self._grams]
        gram = there[:, None, None] * torch.outer(x, x)
        return {"gram": gram, "moment": torch.outer(x, values.nan_to_num(0))}

    def solve(self, sums: Sums, known: Sums) -> Sums:
        """The weights, `F + 1` x `fits`; the last row, of the ones, is not penalised."""
        grams = sums["gram"]
        # one for all columns, or one each
        columns = [sums["moment"]] if len(grams) == 1 else torch.split(sums["moment"], 1, 1)
        made = [
            torch.linalg.solve(gram + _penalty(gram, self.penalty), own)
            for gram, own in zip(grams, columns, strict=True)
        ]
        return {"weights": torch.cat(made, 1)}

    def predict(self, known: Sums, case: Case) -> Prediction:
        """The head's values."""
        return Prediction(
            scores={"given": self.target.bounded(_with_one(self.features(case)) @ known["weights"])}
        )


@dataclass(frozen=True)
class Components(Ridge):
    """Least squares on the first principal components (Massy, 1965): `Ridge`'s sums, another solution.

    Known are `mean` `F`, `axes` `K x F`, `explained` K and `total` (variances) beside the `weights`. They are
    of all values, so a case in which one is unknown is left out.

    Attributes:
        most: components at most; never more than there are dimensions with variance.
    """

    most: int = 16

    @property
    def _grams(self) -> int:
        return 1

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """This case's products."""
        if bool(self.target.regressors(case).isnan().any()):
            return self.zero()
        return super().accumulate(case, known)

    def solve(self, sums: Sums, known: Sums) -> Sums:
        """Mean and covariance come out of the products with one, the axes out of the covariance."""
        gram, moment = sums["gram"][0], sums["moment"]
        cases = gram[-1, -1].clamp_min(1)
        mean = gram[-1, :-1] / cases
        covariance = gram[:-1, :-1] / cases - torch.outer(mean, mean)
        values, vectors = torch.linalg.eigh(covariance)
        kept = max(1, min(self.most, int((values > values[-1] * 1e-9).sum())))
        explained, axes = values.flip(0)[:kept], vectors.flip(1)[:, :kept].T
        slopes = axes @ (moment[:-1] - torch.outer(mean, moment[-1])) / (cases * explained)[:, None]
        weights = axes.T @ slopes
        offset = moment[-1:] / cases - mean @ weights
        return {
            "weights": torch.cat([weights, offset]),
            "mean": mean,
            "axes": axes,
            "explained": explained,
            "total": covariance.trace(),
        }

    def predict(self, known: Sums, case: Case) -> Prediction:
        """The head's values, and `residual`: the distance from the components, a score of oddness."""
        x = self.features(case).double() - known["mean"]
        residual = (x - known["axes"].T @ (known["axes"] @ x)).norm()
        said = super().predict(known, case).scores
        return Prediction(scores={**said, "residual": residual})


@dataclass(frozen=True)
class Logistic(Summed):
    """Logistic regression, each column against the rest, by Newton's method: one exchange an iteration.

    Attributes:
        features, size: as for `Ridge`. penalty: λ of λ/2 ‖w‖². iterations: of Newton's method.
    """

    target: Target
    features: Callable[[Case], Tensor]
    size: int
    penalty: float = 1.0
    iterations: int = 8

    @property
    def exchanges(self) -> int:  # type: ignore[override]
        """One an iteration."""
        return self.iterations

    @property
    def products(self) -> int:
        return self.size

    def start(self) -> Sums:
        """Weights of zero."""
        return {"weights": torch.zeros((self.size + 1, self.target.fits), dtype=torch.float64)}

    def zero(self) -> Sums:
        """Gradient and Hessian of the log-likelihood, one Hessian a column."""
        n, k = self.size + 1, self.target.fits
        return {
            "gradient": torch.zeros((n, k), dtype=torch.float64),
            "hessian": torch.zeros((k, n, n), dtype=torch.float64),
        }

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """This case's part at the weights known."""
        values = self.target.regressors(case)
        x = _with_one(self.features(case))
        p = (x @ known["weights"]).sigmoid()
        there = (~values.isnan()).double()
        outer = torch.outer(x, x)
        return {
            "gradient": torch.outer(x, (values.nan_to_num(0) - p) * there),
            "hessian": (p * (1 - p) * there)[:, None, None] * outer,
        }

    def cells(self, part: Sums) -> Tensor:
        """A head for each column."""
        return (part["gradient"] != 0).any(0).double()

    def solve(self, sums: Sums, known: Sums) -> Sums:
        """One step of Newton's method."""
        n = self.size + 1
        lam = torch.full((n,), self.penalty, dtype=torch.float64)
        lam[-1] = 1e-9
        step = [
            torch.linalg.solve(h + torch.diag(lam), g - lam * w)
            for h, g, w in zip(sums["hessian"], sums["gradient"].T, known["weights"].T, strict=True)
        ]
        return {"weights": known["weights"] + torch.stack(step, 1)}

    def predict(self, known: Sums, case: Case) -> Prediction:
        """Probabilities."""
        fitted = (_with_one(self.features(case)) @ known["weights"]).sigmoid()
        return Prediction(scores={"given": self.target.bounded(fitted)})


def _with_one(features: Tensor) -> Tensor:
    return torch.cat([features.double(), torch.ones(1, dtype=torch.float64)])


def _penalty(gram: Tensor, penalty: float) -> Tensor:
    size = gram.diagonal()[:-1].mean() * penalty
    lam = torch.full((len(gram),), float(size), dtype=torch.float64)
    lam[-1] = 0.0
    return torch.diag(lam.clamp_min(1e-9))
