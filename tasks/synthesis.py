"""How good made images are, in sums: statistics that add over patients and sites, and the trivial maker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from monai.metrics.regression import SSIMMetric
from torch import Tensor

from tasks.base import Case, Prediction, Summed, Sums
from tasks.metrics import Statistics
from tasks.seeds import generator

if TYPE_CHECKING:
    from tasks.gan import Gan

#: cells per axis over which features are averaged, by dimensions
CELLS = {2: 5, 3: 3}
#: share of the mean variance that is added to each feature's: few patients give no full covariance
RIDGE = 0.1

#: class, real image, two made ones of its class; `C H W[D]` in -1 to 1
Example = tuple[int, Tensor, Tensor, Tensor]


def features(image: Tensor) -> Tensor:
    """Mean intensity and mean steepness along each axis, by cell: `C H W[D]` to `F` float64."""
    axes = image.ndim - 1
    steep = [F.pad(image.diff(dim=1 + a).abs(), (0, 0) * (axes - 1 - a) + (0, 1)) for a in range(axes)]
    maps = torch.cat([image, *steep]).double()
    pool = F.adaptive_avg_pool2d if axes == 2 else F.adaptive_avg_pool3d
    return pool(maps, CELLS[axes]).flatten()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al., 2004) of images `B C H W[D]` in -1 to 1: `B`."""
    found = SSIMMetric(spatial_dims=a.ndim - 2, data_range=2.0)._compute_metric(a, b)
    return found.flatten(1).mean(1)


@dataclass(frozen=True)
class SynthesisStatistics(Statistics):
    """Moments of plain features of real and made images by class, summed over patients.

    All float64; `K` classes, `F` features. A patient's images of one class count together as one.

    Attributes:
        count: scalar, patients. images: K, patients with images of the class.
        real, made: `K F`, sums of features. real_square, made_square: `K F F`, of their products.
        alike: K, sums of the similarity of two made images of the class.
    """

    count: Tensor
    images: Tensor
    real: Tensor
    made: Tensor
    real_square: Tensor
    made_square: Tensor
    alike: Tensor

    @classmethod
    def zero(cls, classes: int, channels: int, dimensions: int) -> Self:
        """No patient."""
        size = channels * (1 + dimensions) * CELLS[dimensions] ** dimensions
        each = torch.zeros(classes, dtype=torch.float64)
        first, second = each[:, None].repeat(1, size), each[:, None, None].repeat(1, size, size)
        return cls(each.new_zeros(()), each, first, first, second, second, each)

    @classmethod
    def of_patient(cls, examples: Sequence[Example], zero: SynthesisStatistics) -> SynthesisStatistics:
        """One patient's; `zero` has the form."""
        total = replace(zero, count=torch.ones_like(zero.count))
        for k in sorted({kind for kind, *_ in examples}):
            own = [rest for kind, *rest in examples if kind == k]
            real = torch.stack([features(image) for image, _, _ in own])
            made = torch.stack([features(image) for _, image, _ in own])
            pairs = torch.stack([torch.stack([a, b]) for _, a, b in own]).float()
            one = torch.zeros_like(zero.images)
            one[k] = 1
            total = total + SynthesisStatistics(
                zero.count,
                one,
                one[:, None] * real.mean(0),
                one[:, None] * made.mean(0),
                one[:, None, None] * (real.T @ real / len(own)),
                one[:, None, None] * (made.T @ made / len(own)),
                one * ssim(pairs[:, 0], pairs[:, 1]).mean().double(),
            )
        return total

    @property
    def patients(self) -> int:
        """How many patients were scored."""
        return round(float(self.count))

    @property
    def products(self) -> int:
        return self.real.shape[1]

    def cells(self) -> Tensor:
        """Patients over all and by class."""
        return torch.cat([self.count[None], self.images])

    def guarded(self, minimum: int) -> Self:
        """Without the classes that fewer patients have."""
        enough = self.images >= minimum
        kept = {
            name: torch.where(enough.view(-1, *[1] * (t.ndim - 1)), t, 0.0)
            for name, t in self.sums().items()
            if name != "count"
        }
        return replace(self, **kept)

    def value(self) -> dict[str, float]:
        """Flat metrics, over the classes of two patients or more.

        `frechet`: mean Fréchet distance of made from real features, in units of the real ones' variance;
        `alike`: mean similarity (SSIM) of two made images of one class; `tstr`: area under the ROC curve of
        a linear discriminant made of the made images, on the real ones, both taken as normal.
        """
        there = [k for k in range(len(self.images)) if self.images[k] >= 2]
        if not there:
            return {}
        n = self.images[there][:, None]
        real, made = self.real[there] / n, self.made[there] / n
        real_cov = _covariance(self.real_square[there], real, n)
        made_cov = _covariance(self.made_square[there], made, n)
        scale = real_cov.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
        far = [frechet(*parts) for parts in zip(real, made, real_cov, made_cov, strict=True)]
        found = {
            "frechet": float((torch.stack(far) / (scale * real.shape[1])).mean()),
            "alike": float((self.alike[there] / self.images[there]).mean()),
        }
        pairs = [(a, b) for a in range(len(there)) for b in range(a)]
        if pairs:
            areas = [_area(real[[b, a]], made[[b, a]], real_cov[[b, a]], made_cov[[b, a]]) for a, b in pairs]
            found["tstr"] = sum(areas) / len(areas)
        return found


def _covariance(square: Tensor, mean: Tensor, n: Tensor) -> Tensor:
    return square / n[..., None] - mean[:, :, None] * mean[:, None, :]


def frechet(a: Tensor, b: Tensor, cov_a: Tensor, cov_b: Tensor) -> Tensor:
    """Squared Fréchet distance of two normal distributions (Dowson and Landau, 1982)."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    far: Tensor = ((a - b) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return far


def _area(real: Tensor, made: Tensor, real_cov: Tensor, made_cov: Tensor) -> float:
    """Of the discriminant between two classes of made images, on the real ones."""
    pooled = made_cov.mean(0)
    ridge = RIDGE * pooled.diagonal().mean().clamp_min(1e-12)
    way = torch.linalg.solve(pooled + ridge * torch.eye(len(pooled), dtype=pooled.dtype), made[1] - made[0])
    spread = float((way @ real_cov.sum(0) @ way).clamp_min(1e-300).sqrt())
    return 0.5 * (1 + math.erf(float(way @ (real[1] - real[0])) / spread / math.sqrt(2)))


@dataclass(frozen=True)
class ClassMean(Summed):
    """The mean training image of each class, and at each pixel independent noise of its own spread."""

    task: Gan

    def zero(self) -> Sums:
        """`K C *size` sums of images and squares, and how many cases."""
        kinds = max(self.task.kinds, 1)
        each = torch.zeros(kinds, self.task.channels, *self.task.size, dtype=torch.float64)
        return {"image": each, "square": each.clone(), "cases": each.new_zeros(kinds)}

    def accumulate(self, case: Case, known: Sums) -> Sums:
        """The case's image."""
        total, k = self.zero(), self.task.class_of(case)
        total["image"][k] = self.task.scaled(case).double()
        total["square"][k] = total["image"][k] ** 2
        total["cases"][k] = 1
        return total

    def cells(self, part: Sums) -> Tensor:
        """A mean for each class."""
        return part["cases"]

    def predict(self, known: Sums, case: Case) -> Prediction:
        """Two of the case's class."""
        k = self.task.class_of(case)
        draw = generator(0, case.key, 0, "predict", "noise")
        first, second = self.sample(known, torch.full((2,), k), draw)
        return Prediction(images={self.task.image: first, "second": second})

    def sample(self, known: Sums, label: Tensor, draw: torch.Generator) -> Tensor:
        """Images of the classes `label` (`B`): `B C *size` in -1 to 1."""
        n = known["cases"].clamp_min(1).view(-1, *[1] * (known["image"].ndim - 1))
        mean = known["image"] / n
        spread = (known["square"] / n - mean**2).clamp_min(0).sqrt()
        noise = torch.randn(len(label), *mean.shape[1:], generator=draw, dtype=torch.float64)
        return (mean[label] + spread[label] * noise).clamp(-1, 1).float()
