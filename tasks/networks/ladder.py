"""U-Nets of our own: one ladder of stages, the stages to choose. 2D and 3D, norms by example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from monai.networks.blocks.convolutions import Convolution
from monai.networks.layers.factories import Conv
from pydantic import Field
from torch import Tensor, nn

from tasks.networks.unet import Dimensions, Halvings, Named, Norm, Width, Widths, norm_layer, strides

#: level, channels in, channels out
Stage = Callable[[int, int, int], nn.Module]
Step = tuple[int, ...]
Count = Annotated[int, Field(ge=1, le=8)]


class Climb(nn.Module):
    """The way up: transposed convolutions, what comes up beside what the encoder made at that level.

    Args:
        steps: stride between neighbouring levels, per axis.
        stage: what computes at a level, all but the deepest.
        gate: from a level's width to what takes (encoder's, risen) maps and returns the encoder's; none: all
            of them pass.
    """

    def __init__(
        self,
        dimensions: int,
        outputs: int,
        widths: tuple[int, ...],
        steps: list[Step],
        stage: Stage,
        gate: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        rise = Conv[Conv.CONVTRANS, dimensions]
        pairs = zip(widths[:-1], widths[1:], steps, strict=True)
        self.rise = nn.ModuleList(rise(below, above, step, step) for above, below, step in pairs)
        self.stages = nn.ModuleList(stage(level, 2 * width, width) for level, width in enumerate(widths[:-1]))
        self.gate = nn.ModuleList(gate(width) for width in widths[:-1]) if gate else None
        self.head = Conv[Conv.CONV, dimensions](widths[0], outputs, 1)

    def forward(self, kept: list[Tensor], x: Tensor) -> Tensor:
        """Logits, from what each level kept and the deepest maps."""
        for level in reversed(range(len(self.stages))):
            x = self.rise[level](x)
            skip = kept[level] if self.gate is None else self.gate[level](kept[level], x)
            x = self.stages[level](torch.cat((skip, x), 1))
        made: Tensor = self.head(x)
        return made


class Ladder(nn.Module):
    """Stages down by strided convolutions and up again (Ronneberger et al., 2015, arXiv:1505.04597).

    Args:
        steps, gate: see `Climb`.
        down, up: what computes at a level; the deepest belongs to `down`.
    """

    def __init__(
        self,
        dimensions: int,
        inputs: int,
        outputs: int,
        widths: tuple[int, ...],
        steps: list[Step],
        down: Stage,
        up: Stage,
        gate: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        conv, pairs = Conv[Conv.CONV, dimensions], zip(widths[:-1], widths[1:], steps, strict=True)
        self.down = nn.ModuleList(
            down(level, inputs if level == 0 else width, width) for level, width in enumerate(widths)
        )
        self.step = nn.ModuleList(conv(above, below, step, step) for above, below, step in pairs)
        self.climb = Climb(dimensions, outputs, widths, steps, up, gate)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.climb(*self.descend(x))
        return made

    def descend(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """What each level keeps for the way up, and the deepest maps."""
        kept = []
        for level, stage in enumerate(self.down):
            x = stage(x)
            if level < len(self.step):
                kept.append(x)
                x = self.step[level](x)
        return kept, x


class Gate(nn.Module):
    """Additive attention: coarser maps say where a level's own count (Oktay et al., 2018, equation 1)."""

    def __init__(self, dimensions: int, width: int) -> None:
        super().__init__()
        conv, inner = Conv[Conv.CONV, dimensions], max(1, width // 2)
        self.own, self.risen, self.share = conv(width, inner, 1), conv(width, inner, 1), conv(inner, 1, 1)

    def forward(self, own: Tensor, risen: Tensor) -> Tensor:
        share: Tensor = self.share((self.own(own) + self.risen(risen)).relu()).sigmoid()
        return own * share


class Residual(nn.Module):
    """A body beside a shortcut, which is a 1x1 convolution where the widths differ."""

    def __init__(self, dimensions: int, inputs: int, outputs: int, body: nn.Module) -> None:
        super().__init__()
        conv = Conv[Conv.CONV, dimensions]
        self.body = body
        self.shortcut = nn.Identity() if inputs == outputs else conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.body(x) + self.shortcut(x)
        return total


class Dense(nn.Module):
    """Layers that each see all maps before them (Huang et al., 2017, arXiv:1608.06993), then a 1x1 one."""

    def __init__(self, layers: list[nn.Module], last: nn.Module) -> None:
        super().__init__()
        self.layers, self.last = nn.ModuleList(layers), last

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat((x, layer(x)), 1)
        made: Tensor = self.last(x)
        return made


def convolutions(
    dimensions: int,
    inputs: int,
    outputs: int,
    norm: Named,
    *,
    count: int = 2,
    kernel: int = 3,
    act: str = "RELU",
) -> nn.Sequential:
    """Convolution, norm, activation, so often in a row."""
    return nn.Sequential(
        *(
            Convolution(
                dimensions,
                inputs if i == 0 else outputs,
                outputs,
                kernel_size=kernel,
                adn_ordering="NA",
                norm=norm,
                act=act,
            )
            for i in range(count)
        )
    )


def attention_unet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Widths = (8, 16, 32, 64),
    pools: Halvings | None = None,
    norm: Norm = "instance",
    groups: Width = 1,
) -> nn.Module:
    """Attention U-Net (Oktay et al., 2018, arXiv:1804.03999); sides and `pools` as for `unet`."""
    named = norm_layer(norm, groups, channels)

    def stage(_: int, inputs: int, outputs: int) -> nn.Module:
        return convolutions(dimensions, inputs, outputs, named)

    steps = strides(len(channels), dimensions, pools)
    return Ladder(
        dimensions, in_channels, out_channels, channels, steps, stage, stage, lambda w: Gate(dimensions, w)
    )


def residual_unet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Widths = (8, 16, 32, 64),
    blocks: Count = 2,
    pools: Halvings | None = None,
    norm: Norm = "instance",
    groups: Width = 1,
) -> nn.Module:
    """U-Net with a residual encoder and a light decoder (Isensee et al., 2024, arXiv:2404.09556).

    `blocks`: residual blocks at each level below the first. Sides and `pools` as for `unet`.
    """
    named = norm_layer(norm, groups, channels)

    def down(level: int, inputs: int, outputs: int) -> nn.Module:
        made = []
        for i in range(blocks if level else 1):
            into = outputs if i else inputs
            made.append(Residual(dimensions, into, outputs, convolutions(dimensions, into, outputs, named)))
        return nn.Sequential(*made)

    def up(_: int, inputs: int, outputs: int) -> nn.Module:
        return convolutions(dimensions, inputs, outputs, named, count=1)

    steps = strides(len(channels), dimensions, pools)
    return Ladder(dimensions, in_channels, out_channels, channels, steps, down, up)


def dense_unet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Widths = (8, 16, 32, 64),
    growth: Width = 8,
    layers: Count = 3,
    pools: Halvings | None = None,
    norm: Norm = "instance",
    groups: Width = 1,
) -> nn.Module:
    """U-Net with a densely connected encoder (Li et al., 2018, arXiv:1709.07330, its 2D part).

    `layers` of `growth` maps at each level. Sides and `pools` as for `unet`.
    """
    named = norm_layer(norm, groups, (growth, *channels))

    def down(_: int, inputs: int, outputs: int) -> nn.Module:
        into = [inputs + i * growth for i in range(layers + 1)]
        grown = [convolutions(dimensions, n, growth, named, count=1) for n in into[:-1]]
        return Dense(list(grown), convolutions(dimensions, into[-1], outputs, named, count=1, kernel=1))

    def up(_: int, inputs: int, outputs: int) -> nn.Module:
        return convolutions(dimensions, inputs, outputs, named)

    steps = strides(len(channels), dimensions, pools)
    return Ladder(dimensions, in_channels, out_channels, channels, steps, down, up)


def v_net(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Widths = (8, 16, 32, 64),
    pools: Halvings | None = None,
    norm: Norm = "instance",
    groups: Width = 1,
) -> nn.Module:
    """V-Net (Milletari et al., 2016, arXiv:1606.04797): kernels of 5, one to three in a residual stage.

    Sides and `pools` as for `unet`.
    """
    named = norm_layer(norm, groups, channels)

    def stage(level: int, inputs: int, outputs: int) -> nn.Module:
        count = min(level + 1, 3)
        body = convolutions(dimensions, inputs, outputs, named, count=count, kernel=5, act="PRELU")
        return Residual(dimensions, inputs, outputs, body)

    steps = strides(len(channels), dimensions, pools)
    return Ladder(dimensions, in_channels, out_channels, channels, steps, stage, stage)
