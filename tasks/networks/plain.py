"""Networks for maps that are no U-Nets: one way down with outputs on it, or paths beside each other."""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv, Pool
from pydantic import Field
from torch import Tensor, nn

from tasks.networks.ladder import Count, convolutions
from tasks.networks.unet import Dimensions, Named, Norm, Width, Widths, norm_layer

LINEAR = {2: "bilinear", 3: "trilinear"}
Factor = Annotated[int, Field(ge=2, le=16)]


def _descent(
    dimensions: int, inputs: int, widths: tuple[int, ...], named: Named, convs: int
) -> list[nn.Sequential]:
    """Stages of convolutions, as in VGG; each works at half the resolution of the one before."""
    before = (inputs, *widths[:-1])
    return [convolutions(dimensions, a, b, named, count=convs) for a, b in zip(before, widths, strict=True)]


class FCN(nn.Module):
    """Scores of the last three stages, the coarser ones raised and added to the finer ones."""

    def __init__(
        self, dimensions: int, stages: list[nn.Sequential], widths: tuple[int, ...], out: int
    ) -> None:
        super().__init__()
        conv, rise = Conv[Conv.CONV, dimensions], Conv[Conv.CONVTRANS, dimensions]
        self.stages = nn.ModuleList(stages)
        self.pool = Pool[Pool.MAX, dimensions](2)
        self.scores = nn.ModuleList(conv(width, out, 1) for width in widths[-3:])
        self.rises = nn.ModuleList(rise(out, out, 4, 2, 1) for _ in self.scores[1:])
        full = 2 ** (len(widths) - len(self.scores) + 1)
        self.last = rise(out, out, 2 * full, full, full // 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for stage in self.stages:
            x = self.pool(stage(x))
            maps.append(x)
        *finer, made = (score(m) for score, m in zip(self.scores, maps[-len(self.scores) :], strict=True))
        for rise, own in zip(self.rises, reversed(finer), strict=True):
            made = own + rise(made)
        full: Tensor = self.last(made)
        return full


def fcn(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Annotated[tuple[Width, ...], Field(min_length=3, max_length=6)] = (8, 16, 32, 64, 64),
    convs: Count = 2,
    norm: Norm = "instance",
    groups: Width = 1,
) -> nn.Module:
    """Fully convolutional network (Long et al., 2015, arXiv:1411.4038): with five `channels` an FCN-8s.

    `convs`: convolutions at each level. Sides are multiples of `2 ** len(channels)`.
    """
    stages = _descent(dimensions, in_channels, channels, norm_layer(norm, groups, channels), convs)
    return FCN(dimensions, stages, channels, out_channels)


class HED(nn.Module):
    """Logits from each stage, raised to full size, and their weighted sum: the main ones."""

    def __init__(
        self, dimensions: int, stages: list[nn.Sequential], widths: tuple[int, ...], out: int
    ) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, dimensions]
        self.stages = nn.ModuleList(stages)
        self.pool = Pool[Pool.MAX, dimensions](2)
        self.sides = nn.ModuleList(conv(width, out, 1) for width in widths)
        self.fuse = conv(out * len(widths), out, 1)
        self._linear = LINEAR[dimensions]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        size, sides = x.shape[2:], []
        for level, (stage, side) in enumerate(zip(self.stages, self.sides, strict=True)):
            x = stage(self.pool(x) if level else x)
            sides.append(F.interpolate(side(x), size, mode=self._linear) if level else side(x))
        main: Tensor = self.fuse(torch.cat(sides, 1))
        return (main, *sides) if self.training else main


def hed(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Widths = (8, 16, 32, 64),
    convs: Count = 2,
    norm: Norm = "instance",
    groups: Width = 1,
) -> nn.Module:
    """Holistically nested network (Xie and Tu, 2015, arXiv:1504.06375): every side output is trained too.

    `convs`: convolutions at each level. Sides are at least `2 ** len(channels)`.
    """
    stages = _descent(dimensions, in_channels, channels, norm_layer(norm, groups, channels), convs)
    return HED(dimensions, stages, channels, out_channels)


class DeepMedic(nn.Module):
    """Paths that see the same place at several scales, joined before the last layers."""

    def __init__(
        self, dimensions: int, paths: list[nn.Sequential], factors: list[int], head: nn.Module
    ) -> None:
        super().__init__()
        self.paths, self.head = nn.ModuleList(paths), head
        self.pools = nn.ModuleList(Pool[Pool.AVG, dimensions](f, ceil_mode=True) for f in factors)
        self._linear = LINEAR[dimensions]

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        coarse = zip(self.paths[1:], self.pools, strict=True)
        maps = [F.interpolate(path(pool(x)), size, mode=self._linear) for path, pool in coarse]
        made: Tensor = self.head(torch.cat((self.paths[0](x), *maps), 1))
        return made


def deep_medic(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Widths = (8, 8, 12, 12, 16, 16),
    factors: Annotated[tuple[Factor, ...], Field(min_length=1, max_length=4)] = (3,),
    hidden: Width = 32,
    norm: Norm = "instance",
    groups: Width = 1,
) -> nn.Module:
    """Two-path multi-scale network (Kamnitsas et al., 2017, arXiv:1603.05959), with padded convolutions.

    `channels` of each path; `factors`: how much coarser each further path sees (a second adds a third path);
    `hidden`: width of the two layers that see all paths. Sides are at least twice the largest factor.
    """
    named = norm_layer(norm, groups, (*channels, hidden))

    def path() -> nn.Sequential:
        return nn.Sequential(*_descent(dimensions, in_channels, channels, named, 1))

    head = nn.Sequential(
        convolutions(dimensions, channels[-1] * (1 + len(factors)), hidden, named, kernel=1),
        Conv[Conv.CONV, dimensions](hidden, out_channels, 1),
    )
    return DeepMedic(dimensions, [path() for _ in range(1 + len(factors))], list(factors), head)


def srcnn(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Widths = (16, 16),
    kernels: Annotated[tuple[Annotated[int, Field(ge=1, le=15)], ...], Field(min_length=3, max_length=9)] = (
        5,
        1,
        3,
    ),
) -> nn.Module:
    """Convolutions at full resolution without a norm (Dong et al., 2014, arXiv:1501.00092).

    How steep an edge is, which a norm would take away, is what a filter has to know.

    Args:
        channels: after each layer but the last. kernels: odd sides, one more than `channels`.

    Raises:
        ValueError: `kernels` does not suit.
    """
    if len(kernels) != len(channels) + 1 or any(kernel % 2 == 0 for kernel in kernels):
        raise ValueError(
            f"model.kernels is {list(kernels)}; with {len(channels)} model.channels it needs "
            f"{len(channels) + 1} odd numbers"
        )
    body = nn.Sequential()
    for before, after, kernel in zip(
        (in_channels, *channels), (*channels, out_channels), kernels, strict=True
    ):
        body.extend([Conv[Conv.CONV, dimensions](before, after, kernel, padding=kernel // 2), nn.LeakyReLU()])
    return body[:-1]
