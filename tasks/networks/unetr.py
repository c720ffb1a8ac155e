"""A transformer that makes maps: tokens are encoded, convolutions decode. 2D and 3D, images of any size."""

from __future__ import annotations

from typing import Annotated

from monai.networks.layers.factories import Conv
from pydantic import Field
from torch import Tensor, nn

from tasks.networks.ladder import Climb, convolutions
from tasks.networks.unet import Dimensions, Named, Norm, Width, norm_layer
from tasks.networks.vit import Block, places

PATCH = 16


class UNETR(nn.Module):
    """What a transformer knows after each quarter of its layers, raised to the levels of a decoder."""

    def __init__(
        self,
        dimensions: int,
        inputs: int,
        climb: Climb,
        widths: tuple[int, ...],
        body: list[Block],
        named: Named,
    ) -> None:
        super().__init__()
        hidden = widths[-1]
        rise = Conv[Conv.CONVTRANS, dimensions]
        self.embed = Conv[Conv.CONV, dimensions](inputs, hidden, PATCH, PATCH)
        self.body = nn.ModuleList(body)
        self.norm = nn.LayerNorm(hidden)
        self.climb = climb
        self.own = convolutions(dimensions, inputs, widths[0], named)
        self.raised = nn.ModuleList()
        for level, width in enumerate(widths[1:-1], 1):
            steps: list[nn.Module] = []
            for step in range(4 - level):
                steps.append(rise(hidden if step == 0 else width, width, 2, 2))
                steps.append(convolutions(dimensions, width, width, named, count=1))
            self.raised.append(nn.Sequential(*steps))

    def forward(self, x: Tensor) -> Tensor:
        grid = self.embed(x)
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = tokens + places(grid.shape[2:], tokens)
        known, quarter = [], len(self.body) // 4
        for n, block in enumerate(self.body, 1):
            tokens = block(tokens)
            if n % quarter == 0:
                known.append(tokens)
        known[-1] = self.norm(known[-1])
        *skips, last = [t.transpose(1, 2).reshape(grid.shape).contiguous() for t in known]
        kept = [self.own(x), *(raise_(skip) for raise_, skip in zip(self.raised, skips, strict=True))]
        made: Tensor = self.climb(kept, last)
        return made


def unetr(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    width: Width = 8,
    hidden: Annotated[int, Field(ge=12, le=3072, multiple_of=12)] = 96,
    depth: Annotated[int, Field(ge=4, le=48, multiple_of=4)] = 4,
    heads: Annotated[int, Field(ge=1, le=48)] = 4,
    norm: Norm = "instance",
    groups: Width = 1,
) -> nn.Module:
    """UNETR (Hatamizadeh et al., 2022, arXiv:2103.10504), with fixed places instead of learnt ones.

    `width` at full size, doubled with each level; `hidden`: of a token, a multiple of `heads`; `depth`:
    layers. Sides are multiples of 16, one of them at least 32.

    Raises:
        ValueError: `heads` does not divide `hidden`.
    """
    if hidden % heads:
        raise ValueError(f"model.heads is {heads}; it must divide model.hidden, which is {hidden}")
    widths = (width, 2 * width, 4 * width, 8 * width, hidden)
    named = norm_layer(norm, groups, widths[:-1])

    def stage(_: int, inputs: int, outputs: int) -> nn.Module:
        return convolutions(dimensions, inputs, outputs, named)

    climb = Climb(dimensions, out_channels, widths, [(2,) * dimensions] * 4, stage)
    body = [Block(hidden, heads, 2 * hidden) for _ in range(depth)]
    return UNETR(dimensions, in_channels, climb, widths, body, named)
