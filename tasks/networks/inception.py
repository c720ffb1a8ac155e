"""A small network whose layers look at several scales at once."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.layers.factories import Pool
from pydantic import Field
from torch import Tensor, nn

from tasks.networks.trunk import Mean, Trunk
from tasks.networks.unet import Dimensions, Width

Fours = Annotated[int, Field(ge=4, le=4096, multiple_of=4)]
Levels = Annotated[tuple[Fours, ...], Field(min_length=2, max_length=5)]


class Inception(nn.Module):
    """Four views of the same maps, `channels / 4` each: points, 3, 5 (as two of 3), and a maximum over 3."""

    def __init__(self, dimensions: int, inputs: int, channels: int) -> None:
        super().__init__()
        part = channels // 4
        self.point = _layer(dimensions, inputs, part, 1)
        self.near = nn.Sequential(_layer(dimensions, inputs, part, 1), _layer(dimensions, part, part, 3))
        self.far = nn.Sequential(
            _layer(dimensions, inputs, part, 1),
            _layer(dimensions, part, part, 3),
            _layer(dimensions, part, part, 3),
        )
        self.peak = nn.Sequential(
            Pool["MAX", dimensions](3, stride=1, padding=1), _layer(dimensions, inputs, part, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.point(x), self.near(x), self.far(x), self.peak(x)], 1)


def inception(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Levels = (16, 32, 64, 128),
) -> nn.Module:
    """After GoogLeNet (Szegedy et al., 2015, arXiv:1409.4842; 5 as two of 3: arXiv:1512.00567), but small.

    Norms are over all filters of a branch (one group).

    Args:
        channels: of the stem and of each level after it, multiples of 4; each halves the sides.
    """
    body = nn.Sequential(_layer(dimensions, in_channels, channels[0], 5, stride=2))
    for before, after in pairwise(channels):
        halve = Pool["MAX", dimensions](3, stride=2, padding=1)
        body.extend([Inception(dimensions, before, after), halve])
    return Trunk(body, Mean(), nn.Linear(channels[-1], out_channels), channels[-1])


def _layer(dimensions: int, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    norm = ("group", {"num_groups": 1})
    return Convolution(dimensions, inputs, outputs, stride, kernel, norm=norm, act="relu", bias=False)
