"""A vision transformer for images of any size."""

from __future__ import annotations

from typing import Annotated

import torch
from monai.networks.layers.factories import Conv
from pydantic import Field
from torch import Tensor, nn

from tasks.networks.trunk import Mean, Trunk
from tasks.networks.unet import Dimensions, Width


class Block(nn.Module):
    """Attention and a layer for each token, both beside a shortcut, norms first: `B N F` to `B N F`.

    Plain products: MONAI's block needs a library more, and torch's fused attention is not mapped over
    patients but run for one after the other.
    """

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.ask = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.each = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.ask(self.norm1(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(3)
        x = x + self.join((weights @ value).transpose(1, 2).flatten(2))
        out: Tensor = x + self.each(self.norm2(x))
        return out


class Tokens(nn.Module):
    """Patches as tokens through transformer blocks and back on their grid: `B C H W[D]` to `B F h w[d]`."""

    def __init__(
        self, dimensions: int, inputs: int, width: int, depth: int, heads: int, inner: int, patch: int
    ) -> None:
        super().__init__()
        self.embed = Conv["CONV", dimensions](inputs, width, patch, stride=patch)
        self.blocks = nn.Sequential(*(Block(width, heads, inner) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        grid = self.embed(x)
        tokens = grid.flatten(2).transpose(1, 2)
        tokens = self.norm(self.blocks(tokens + places(grid.shape[2:], tokens)))
        found: Tensor = tokens.transpose(1, 2).unflatten(2, grid.shape[2:])
        return found


def places(sides: torch.Size, tokens: Tensor) -> Tensor:
    """Sines and cosines of each token's place, `N F` (Vaswani et al., 2017, arXiv:1706.03762).

    Args:
        sides: of the grid of `N` tokens; each axis has an equal share of the numbers.
        tokens: `B N F`, for type and device; F is a multiple of twice the number of axes.
    """
    waves = tokens.shape[-1] // (2 * len(sides))
    rates = 1e4 ** (-torch.arange(waves, device=tokens.device, dtype=tokens.dtype) / waves)
    parts = []
    for axis, side in enumerate(sides):
        angles = torch.arange(side, device=tokens.device, dtype=tokens.dtype)[:, None] * rates
        shape = [-1 if i == axis else 1 for i in range(len(sides))]
        parts.append(torch.cat([angles.sin(), angles.cos()], 1).view(*shape, 2 * waves).expand(*sides, -1))
    return torch.cat(parts, -1).flatten(0, -2)


def vit(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    width: Annotated[int, Field(ge=12, le=3072, multiple_of=12)] = 96,
    depth: Annotated[int, Field(ge=1, le=48)] = 4,
    heads: Annotated[int, Field(ge=1, le=48)] = 4,
    inner: Width = 192,
    patch: Annotated[int, Field(ge=2, le=32)] = 8,
) -> nn.Module:
    """Vision transformer (Dosovitskiy et al., 2021, arXiv:2010.11929).

    Fixed places and a mean suit small data better than learnt places and a class token (Beyer et al., 2022,
    arXiv:2205.01580), and take images of any size. ViT-B/16: `width=768 depth=12 heads=12
    inner=3072 patch=16`.

    Args:
        width: of a token; a multiple of `heads`. inner: of the layers within a block.
        patch: side in pixels; what is left over at the far edges is not seen.

    Raises:
        ValueError: `heads` does not divide `width`.
    """
    if width % heads:
        raise ValueError(f"model.heads is {heads}; it must divide model.width, which is {width}")
    body = Tokens(dimensions, in_channels, width, depth, heads, inner, patch)
    return Trunk(body, Mean(), nn.Linear(width, out_channels), width)
