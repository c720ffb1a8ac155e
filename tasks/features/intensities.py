"""What grey values alone tell: their distribution, and a coarse picture of where they are."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor

from conf.table import STRICT
from tasks.data.resample import resample

Count = Annotated[int, Field(ge=1, le=1024)]
_PERCENT = (1, 5, 10, 25, 50, 75, 90, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Intensities:
    """First-order features of each channel: mean, deviation, skewness, kurtosis, energy, percentiles.

    As in the Image Biomarker Standardisation Initiative (arXiv:1612.07003, section 3.3).
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    channels: Count
    dimensions: Literal[2, 3]

    @property
    def size(self) -> int:
        return self.channels * (5 + len(_PERCENT))

    def __call__(self, image: Tensor) -> Tensor:
        values = image.flatten(1).double()
        mean, spread = values.mean(1, keepdim=True), values.std(1, keepdim=True, correction=0)
        scaled = (values - mean) / spread.clamp_min(1e-6)
        cuts = torch.tensor(_PERCENT, dtype=torch.float64) / 100
        ordered = torch.quantile(values[:, :: max(1, values.shape[1] // 100_000)], cuts, dim=1).T
        moments = [mean, spread, *(scaled.pow(k).mean(1, keepdim=True) for k in (3, 4))]
        return torch.cat([*moments, values.square().mean(1, keepdim=True), ordered], 1).flatten().float()


@dataclass(frozen=True, kw_only=True)
class Nothing:
    """No feature, and no image needed: the table alone."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    channels: Count
    dimensions: Literal[2, 3]
    size: ClassVar[int] = 0

    def __call__(self, image: Tensor) -> Tensor:
        return torch.empty(0)


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """The image itself, very small: `side` cells along each axis."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    channels: Count
    dimensions: Literal[2, 3]
    side: Annotated[int, Field(ge=1, le=64)] = 8

    @property
    def size(self) -> int:
        return self.channels * prod([self.side] * self.dimensions)

    def __call__(self, image: Tensor) -> Tensor:
        return resample(image, (self.side,) * self.dimensions).flatten()
