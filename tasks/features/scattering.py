"""A fixed wavelet scattering transform."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import pi
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from torch import Tensor

from conf.table import STRICT
from tasks.data.resample import resample


@dataclass(frozen=True, kw_only=True)
class Scattering:
    """Bruna and Mallat, 2013 (arXiv:1203.1513): moduli of Morlet wavelets, one and two deep, then means.

    What DP-SGD learns best on with few patients (Tramèr and Boneh, 2021, arXiv:2011.11660). Each path is
    brought to logarithms, so that a head sees ratios.

    Attributes:
        side: the image is stretched onto, a power of two. scales: J, octaves. directions: L.
        cells: means are taken over a grid of so many along each axis.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    channels: Annotated[int, Field(ge=1, le=64)]
    dimensions: Literal[2]
    side: Literal[32, 64, 128, 256] = 64
    scales: Annotated[int, Field(ge=1, le=5)] = 3
    directions: Annotated[int, Field(ge=2, le=16)] = 6
    cells: Annotated[int, Field(ge=1, le=32)] = 6

    @property
    def paths(self) -> int:
        """The mean, J L of one modulus, L² J (J - 1) / 2 of two."""
        j, n = self.scales, self.directions
        return 1 + j * n + n * n * j * (j - 1) // 2

    @property
    def size(self) -> int:
        return self.channels * self.paths * self.cells**2

    def __call__(self, image: Tensor) -> Tensor:
        x = resample(image, (self.side, self.side))
        waves = _wavelets(self.side, self.scales, self.directions)
        first = _moduli(x, waves)  # J L C H W
        paths = [x[None], first]
        for j in range(self.scales - 1):
            # a modulus of scale j has nothing left that is finer
            deeper = _moduli(first[j * self.directions : (j + 1) * self.directions], waves[j + 1 :])
            paths.append(deeper.flatten(0, 1))
        found = F.adaptive_avg_pool2d(torch.cat([p.reshape(-1, *x.shape) for p in paths]), self.cells)
        found[1:] = torch.log1p(found[1:] * 10)
        return found.flatten()


def _moduli(x: Tensor, waves: Tensor) -> Tensor:
    """|x * ψ| for each wavelet: `… H W` to `J L … H W` with the first two as one."""
    spectrum = torch.fft.fft2(x)
    flat = waves.flatten(0, 1)
    made: Tensor = torch.fft.ifft2(flat.view(-1, *[1] * (x.ndim - 2), *flat.shape[1:]) * spectrum)
    return made.abs()


@lru_cache(maxsize=8)
def _wavelets(side: int, scales: int, directions: int) -> Tensor:
    """Fourier transforms of Morlet wavelets, `J L side side`, each zero at frequency zero.

    Centre frequency 3π/4 / 2^j, width 0.8 * 2^j pixels, slant 4/L (Kymatio's defaults, arXiv:1812.11214).
    """
    axis = torch.fft.fftfreq(side, dtype=torch.float64) * 2 * pi
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    made = []
    for j in range(scales):
        sigma, xi = 0.8 * 2.0**j, 3 * pi / 4 / 2.0**j
        for k in range(directions):
            angle = torch.tensor(pi * k / directions, dtype=torch.float64)
            cos, sin = angle.cos(), angle.sin()
            along, across = u * cos + v * sin, (v * cos - u * sin) / (4 / directions)
            # wrapped copies: frequencies are on a circle
            bump = sum(_bump(along + 2 * pi * a, across, xi, sigma) for a in (-1, 0, 1))
            low = sum(_bump(along + 2 * pi * a, across, 0.0, sigma) for a in (-1, 0, 1))
            if not isinstance(bump, Tensor) or not isinstance(low, Tensor):
                raise TypeError("a sum of tensors is one")
            made.append(bump - low * (bump[0, 0] / low[0, 0]))
    return torch.stack(made).view(scales, directions, side, side).float()


def _bump(along: Tensor, across: Tensor, centre: float, sigma: float) -> Tensor:
    made: Tensor = torch.exp(-0.5 * sigma**2 * ((along - centre) ** 2 + across**2))
    return made
