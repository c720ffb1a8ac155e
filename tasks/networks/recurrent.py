"""Volumes as sequences of slices: 2D maps of each, and memory along the last axis."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from tasks.networks.ladder import Ladder, convolutions
from tasks.networks.unet import Norm, Width, Widths, norm_layer, strides


class ConvLSTM(nn.Module):
    """Convolutional LSTM (Shi et al., 2015, arXiv:1506.04214, equation 3): `B T C H W` to the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.told = nn.Conv2d(width, 4 * width, 3, padding=1)
        self.recalled = nn.Conv2d(width, 4 * width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        told = self.told(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        hidden = cell = torch.zeros_like(x[:, 0])
        made = []
        for step in told.unbind(1):
            write, keep, show, new = (step + self.recalled(hidden)).chunk(4, 1)
            cell = keep.sigmoid() * cell + write.sigmoid() * new.tanh()
            hidden = show.sigmoid() * cell.tanh()
            made.append(hidden)
        return torch.stack(made, 1)


class Slices(nn.Module):
    """A 2D ladder over each slice, whose deepest maps are told what both directions of slices remember."""

    def __init__(self, ladder: Ladder, width: int) -> None:
        super().__init__()
        self.ladder = ladder
        self.ahead, self.back = ConvLSTM(width), ConvLSTM(width)

    def forward(self, x: Tensor) -> Tensor:
        count = (x.shape[0], x.shape[-1])
        kept, low = self.ladder.descend(x.movedim(-1, 1).flatten(0, 1))
        line = low.view(*count, *low.shape[1:])
        line = line + self.ahead(line) + self.back(line.flip(1)).flip(1)
        made: Tensor = self.ladder.climb(kept, line.flatten(0, 1))
        return made.view(*count, *made.shape[1:]).movedim(1, -1)


def recurrent_unet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Literal[3],
    channels: Widths = (8, 16, 32),
    norm: Norm = "instance",
    groups: Width = 1,
) -> nn.Module:
    """U-Net of slices with a ConvLSTM in both directions (after Chen et al., 2016, arXiv:1609.01006).

    The last axis is the one that the slices follow, of any length; the first two sides are multiples of
    `2 ** (len(channels) - 1)`.
    """
    named = norm_layer(norm, groups, channels)

    def stage(_: int, inputs: int, outputs: int) -> nn.Module:
        return convolutions(2, inputs, outputs, named)

    steps = strides(len(channels), dimensions - 1, None)
    ladder = Ladder(2, in_channels, out_channels, channels, steps, stage, stage)
    return Slices(ladder, channels[-1])
