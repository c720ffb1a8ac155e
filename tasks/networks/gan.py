"""Generators and discriminators of images and volumes. No layer looks beyond one example.

A generator makes `B C H W[D]` in -1 to 1 of noise `B Z` and classes `B`; a discriminator makes scores
`B 1` or `B 1 h w[d]` of such images and their classes. With `classes` 0 the classes are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

Dimensions = Literal[2, 3]
Width = Annotated[int, Field(ge=1, le=4096)]
Classes = Annotated[int, Field(ge=0, le=256)]
Sides = Annotated[tuple[Width, ...], Field(min_length=2, max_length=3)]
Halvings = Annotated[int, Field(ge=1, le=7)]
Norm = Literal["instance", "group", "none"]
CriticNorm = Literal["spectral", "instance", "group", "none"]

_CONV = {2: nn.Conv2d, 3: nn.Conv3d}
_UP = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_LEAK = 0.2
_ITERATIONS = 8


class _Spectral(nn.Module):
    """Divides a weight by its largest singular value (Miyato et al., 2018, arXiv:1802.05957).

    The power iteration begins anew from the weight itself each time. The usual one keeps its vectors in
    buffers: a memory of earlier steps, which sites would have to average and DP would have to refuse.
    """

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.flatten(1)
        with torch.no_grad():
            right = rows.sum(0)
            for _ in range(_ITERATIONS):
                left = F.normalize(rows @ right, dim=0)
                right = F.normalize(rows.T @ left, dim=0)
        return weight / (left @ rows @ right).clamp_min(1e-6)


def _spectral(layer: nn.Module, norm: str) -> nn.Module:
    if norm == "spectral":
        register_parametrization(layer, "weight", _Spectral())
    return layer


def _norm(norm: str, width: int, groups: int, *, affine: bool = True) -> nn.Module:
    """Raises ValueError where `groups` does not divide `width`."""
    if norm in ("none", "spectral"):
        return nn.Identity()
    if norm == "group" and width % groups:
        raise ValueError(f"model.groups is {groups}; it must divide every width, and {width} is one")
    return nn.GroupNorm(width if norm == "instance" else groups, width, affine=affine)


def _levels(sides: Sequence[int], levels: int) -> tuple[int, ...]:
    """The sides after `levels` halvings.

    Raises:
        ValueError: they cannot be halved so often.
    """
    if any(side % 2**levels or side < 2 * 2**levels for side in sides):
        raise ValueError(
            f"the image's sides are {list(sides)}; with model.levels={levels} they must be multiples of "
            f"{2**levels}, and at least twice that"
        )
    return tuple(side // 2**levels for side in sides)


class _Classes(nn.Module):
    """A vector for each class; without classes, zeros."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(max(classes, 1), width)) if classes else None
        self.width = width

    def forward(self, label: Tensor) -> Tensor:
        if self.weight is None:
            return torch.zeros(*label.shape, self.width, device=label.device)
        # by comparison: an index outside would be read as an error of the device, and vmap forbids a look
        kinds = torch.arange(len(self.weight), device=label.device)
        return (label[..., None] == kinds).to(self.weight.dtype) @ self.weight


class _Modulated(nn.Module):
    """A norm whose scale and shift are made of noise and class (de Vries et al., 2017, arXiv:1707.00683)."""

    def __init__(self, width: int, style: int, norm: str, groups: int) -> None:
        super().__init__()
        self.norm = _norm(norm, width, groups, affine=False)
        self.style = nn.Linear(style, 2 * width)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale, shift = self.style(style).view(x.shape[0], -1, *[1] * (x.ndim - 2)).chunk(2, 1)
        return F.leaky_relu(self.norm(x) * (1 + scale) + shift, _LEAK)


class Generator(nn.Module):
    """From a small grid up, doubling the sides: an image of noise and class."""

    def __init__(
        self,
        latent: int,
        channels: int,
        dimensions: int,
        sides: Sequence[int],
        classes: int,
        widths: Sequence[int],
        norm: str,
        groups: int,
        residual: bool,
    ) -> None:
        super().__init__()
        conv, style = _CONV[dimensions], 2 * latent
        self.first = _levels(sides, len(widths) - 1)
        self.classes = _Classes(classes, latent)
        cells = 1
        for side in self.first:
            cells *= side
        self.start = nn.Linear(style, widths[0] * cells)
        self.modulated = nn.ModuleList(_Modulated(w, style, norm, groups) for w in widths)
        pairs = list(pairwise(widths))
        self.up = nn.ModuleList(_UP[dimensions](a, b, 4, stride=2, padding=1) for a, b in pairs)
        self.skips = nn.ModuleList(conv(a, b, 1, bias=False) for a, b in pairs if residual)
        self.last = conv(widths[-1], channels, 3, padding=1)

    def forward(self, noise: Tensor, label: Tensor) -> Tensor:
        style = torch.cat([noise, self.classes(label)], 1)
        x = self.start(style).view(noise.shape[0], -1, *self.first)
        for i, up in enumerate(self.up):
            h = up(self.modulated[i](x, style))
            x = h + F.interpolate(self.skips[i](x), scale_factor=2.0) if len(self.skips) else h
        return torch.tanh(self.last(self.modulated[-1](x, style)))


class Discriminator(nn.Module):
    """Halves the sides, then scores: one number (`levels` down to a small grid), or one for each patch.

    The class enters by projection (Miyato and Koyama, 2018, arXiv:1802.05637): the score gets the inner
    product of the features and a vector of the class.
    """

    def __init__(
        self,
        channels: int,
        dimensions: int,
        classes: int,
        widths: Sequence[int],
        norm: str,
        groups: int,
        patches: bool,
        residual: bool,
    ) -> None:
        super().__init__()
        conv = _CONV[dimensions]
        pairs = list(zip((channels, *widths[:-1]), widths, strict=True))
        self.down = nn.ModuleList(
            _spectral(conv(a, b, 4, stride=2, padding=1, padding_mode="reflect"), norm) for a, b in pairs
        )
        self.norms = nn.ModuleList(
            # the first layer sees intensities, whose level is to be told
            nn.Identity() if i == 0 else _norm(norm, w, groups)
            for i, w in enumerate(widths)
        )
        self.skips = nn.ModuleList(_spectral(conv(a, b, 1), norm) for a, b in pairs if residual)
        self.score = _spectral(
            conv(widths[-1], 1, 3, padding=1) if patches else nn.Linear(widths[-1], 1), norm
        )
        self.classes = _Classes(classes, widths[-1])
        self.patches = patches

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        x = image
        for i, (down, norm) in enumerate(zip(self.down, self.norms, strict=True)):
            h = F.leaky_relu(norm(down(x)), _LEAK)
            x = h + self.skips[i](_halved(x)) if len(self.skips) else h
        vector = self.classes(label)
        if not self.patches:
            x = x.flatten(2).mean(2)
        chosen = x * vector.view(*vector.shape, *[1] * (x.ndim - 2))
        score: Tensor = self.score(x) + chosen.mean(1, keepdim=True) * math.sqrt(x.shape[1])
        return score


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2) if x.ndim == 4 else F.avg_pool3d(x, 2)


def _narrowing(width: int, levels: int) -> list[int]:
    """Widths from a small grid up: half as wide at each doubling, from 8 times `width` at most."""
    return [width * min(8, 2**i) for i in range(levels, -1, -1)]


def dcgan(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    sides: Sides,
    classes: Classes,
    width: Width = 16,
    levels: Halvings = 4,
    norm: Norm = "instance",
    groups: Width = 1,
) -> nn.Module:
    """Transposed convolutions (Radford et al., 2016, arXiv:1511.06434), without their BatchNorm.

    Args:
        in_channels: length of the noise. width: of the finest level. levels: doublings.
    """
    widths = _narrowing(width, levels)
    return Generator(
        in_channels, out_channels, dimensions, sides, classes, widths, norm, groups, residual=False
    )


def residual_generator(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    sides: Sides,
    classes: Classes,
    width: Width = 16,
    levels: Halvings = 4,
    norm: Norm = "instance",
    groups: Width = 1,
) -> nn.Module:
    """The same with a shortcut about each doubling (Gulrajani et al., 2017, arXiv:1704.00028)."""
    widths = _narrowing(width, levels)
    return Generator(
        in_channels, out_channels, dimensions, sides, classes, widths, norm, groups, residual=True
    )


def dcgan_discriminator(
    *,
    in_channels: Width,
    dimensions: Dimensions,
    classes: Classes,
    width: Width = 16,
    levels: Halvings = 4,
    norm: CriticNorm = "spectral",
    groups: Width = 1,
) -> nn.Module:
    """Strided convolutions, one score an image (Radford et al., 2016)."""
    widths = _narrowing(width, levels - 1)[::-1]
    return Discriminator(
        in_channels, dimensions, classes, widths, norm, groups, patches=False, residual=False
    )


def residual_discriminator(
    *,
    in_channels: Width,
    dimensions: Dimensions,
    classes: Classes,
    width: Width = 16,
    levels: Halvings = 4,
    norm: CriticNorm = "spectral",
    groups: Width = 1,
) -> nn.Module:
    """The same with a shortcut about each halving (Gulrajani et al., 2017)."""
    widths = _narrowing(width, levels - 1)[::-1]
    return Discriminator(in_channels, dimensions, classes, widths, norm, groups, patches=False, residual=True)


def patch_gan(
    *,
    in_channels: Width,
    dimensions: Dimensions,
    classes: Classes,
    width: Width = 16,
    levels: Halvings = 3,
    norm: CriticNorm = "spectral",
    groups: Width = 1,
) -> nn.Module:
    """A score for each patch (Isola et al., 2017, arXiv:1611.07004, section 3.2.2)."""
    widths = _narrowing(width, levels - 1)[::-1]
    return Discriminator(in_channels, dimensions, classes, widths, norm, groups, patches=True, residual=False)
