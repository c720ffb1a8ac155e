"""A small head on fixed local features and on where they are: hundreds of weights, not thousands.

What is left to learn when patients are few and their gradients noised: each weight less is noise less.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tasks.networks.unet import Dimensions, Width

Degree = Annotated[int, Field(ge=0, le=8)]
Scales = Annotated[tuple[Annotated[float, Field(gt=0, le=32)], ...], Field(min_length=1, max_length=6)]


class ScaleSpace(nn.Module):
    """Gaussian derivatives at several scales, polynomials of position, products of both, and a small head.

    Each feature has mean 0 and deviation 1 over the image.

    A position is a share of the input's sides, from -1 to 1: what the network is given should be the whole
    image, or always the same part of it.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        axes: int,
        scales: tuple[float, ...],
        degree: int,
        joint: int,
        hidden: int,
    ) -> None:
        super().__init__()
        self.scales = scales
        powers = [p for p in product(range(degree + 1), repeat=axes) if sum(p) <= degree]
        self.powers = sorted(powers, key=lambda p: (sum(p), p))
        #: constant first; so many of them multiply what is seen
        self.shared = sum(sum(p) <= joint for p in self.powers)
        features = len(self.powers) - 1 + self.shared * channels * (1 + 3 * len(scales))
        convolution = nn.Conv2d if axes == 2 else nn.Conv3d
        self.hidden = convolution(features, hidden, 1) if hidden else None
        self.head = convolution(hidden or features, classes, 1)
        nn.init.zeros_(self.head.weight)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        read = self.features(x)
        if self.hidden is not None:
            read = self.hidden(read).tanh()
        logits: Tensor = self.head(read)
        return logits

    def features(self, x: Tensor) -> Tensor:
        """`B C H W[D]` to `B features H W[D]`."""
        seen = torch.cat([x, *(made for scale in self.scales for made in _local(x, scale))], 1)
        where = self._where(x)
        mixed = seen.unsqueeze(1) * where[: self.shared].unsqueeze(1)
        places = where[1:].expand(x.shape[0], *where[1:].shape)
        read = torch.cat([mixed.flatten(1, 2), places], 1)
        axes = tuple(range(2, x.ndim))
        read = read - read.mean(axes, keepdim=True)
        return read / (read.square().mean(axes, keepdim=True) + 1e-6).sqrt()

    def _where(self, x: Tensor) -> Tensor:
        """Products of Legendre polynomials along the axes: `powers H W[D]`."""
        sides = x.shape[2:]
        degree = sum(self.powers[-1])
        along = []
        for axis, side in enumerate(sides):
            t = (torch.arange(side, dtype=x.dtype, device=x.device) + 0.5) * (2 / side) - 1
            rows = [torch.ones_like(t), t]
            for n in range(1, degree):
                rows.append(((2 * n + 1) * t * rows[n] - n * rows[n - 1]) / (n + 1))
            shape = [1] * len(sides)
            shape[axis] = side
            along.append([row.view(shape) for row in rows])
        made = []
        for powers in self.powers:
            term = torch.ones(sides, dtype=x.dtype, device=x.device)
            for axis, power in enumerate(powers):
                term = term * along[axis][power]
            made.append(term)
        return torch.stack(made)


def _local(x: Tensor, scale: float) -> list[Tensor]:
    """Smoothed, length of the gradient, Laplacian; the last two in units of the scale (Lindeberg, 1998)."""
    reach = max(1, round(3 * scale))
    t = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    bell = torch.exp(-0.5 * (t / scale) ** 2)
    bell = bell / bell.sum()
    kernels = [bell, -t / scale * bell, ((t / scale) ** 2 - 1) * bell]

    def along(y: Tensor, axis: int, kernel: Tensor) -> Tensor:
        rows = y.movedim(axis, -1)
        flat = rows.reshape(-1, 1, rows.shape[-1])
        padded = F.pad(flat, (reach, reach), mode="replicate")
        return F.conv1d(padded, kernel.view(1, 1, -1)).view(rows.shape).movedim(-1, axis)

    axes = range(2, x.ndim)

    def derivative(order: dict[int, int]) -> Tensor:
        y = x
        for axis in axes:
            y = along(y, axis, kernels[order.get(axis, 0)])
        return y

    first = [derivative({axis: 1}) for axis in axes]
    second = [derivative({axis: 2}) for axis in axes]
    length = (torch.stack(first).square().sum(0) + 1e-6).sqrt()
    return [derivative({}), length, torch.stack(second).sum(0)]


def scale_space(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    scales: Scales = (1.0, 2.5),
    degree: Degree = 4,
    joint: Degree = 0,
    hidden: Annotated[int, Field(ge=0, le=1024)] = 16,
) -> nn.Module:
    """A small classifier of each voxel.

    Args:
        scales: of the Gaussians, in voxels. degree: of the polynomials of position.
        joint: degree up to which they also multiply each local feature, so that what is seen means other
            things at other places.
        hidden: width of a layer between; 0: none, a linear classifier.
    """
    return ScaleSpace(in_channels, out_channels, dimensions, scales, degree, joint, hidden)
