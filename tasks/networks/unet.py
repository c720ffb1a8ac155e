"""U-Nets of MONAI, 2D and 3D, with norms that look at one example at a time."""

from __future__ import annotations

from typing import Annotated, Literal

from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.unet import UNet
from pydantic import Field
from torch import nn

Dimensions = Literal[2, 3]
Width = Annotated[int, Field(ge=1, le=4096)]
Widths = Annotated[tuple[Width, ...], Field(min_length=2, max_length=8)]
Halvings = Annotated[tuple[Annotated[int, Field(ge=0, le=7)], ...], Field(min_length=2, max_length=3)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Norm = Literal["instance", "group"]
Named = tuple[str, dict[str, object]]


def norm_layer(norm: Norm, groups: int, widths: tuple[int, ...]) -> Named:
    """MONAI's name and arguments of a norm; affine, so that the network can undo it.

    Raises:
        ValueError: `groups` does not divide one of the `widths` that are normalised.
    """
    if norm == "instance":
        return "instance", {"affine": True}
    if any(width % groups for width in widths):
        raise ValueError(f"model.groups is {groups}; it must divide every width in {sorted(set(widths))}")
    return "group", {"num_groups": groups}


def strides(levels: int, dimensions: int, pools: Halvings | None) -> list[tuple[int, ...]]:
    """The stride of each step down: 2 along every axis, or as often per axis as `pools` says.

    An axis of fewer halvings is first halved further down, where the others have caught up with its coarser
    spacing (Isensee et al., 2021).

    Raises:
        ValueError: `pools` does not fit the number of levels or axes.
    """
    steps = levels - 1
    if pools is None:
        return [(2,) * dimensions] * steps
    if len(pools) != dimensions or max(pools) != steps:
        raise ValueError(
            f"model.pools is {list(pools)}; with {levels} levels and {dimensions} axes it needs {dimensions} "
            f"numbers, the largest {steps}"
        )
    return [tuple(2 if step >= steps - n else 1 for n in pools) for step in range(steps)]


def unet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Widths = (16, 32, 64, 128),
    pools: Halvings | None = None,
    residual_units: Annotated[int, Field(ge=0, le=4)] = 2,
    norm: Norm = "instance",
    groups: Width = 1,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """Residual U-Net (Kerfoot et al., STACOM 2018), which strides before it convolves: fast on a CPU.

    Every side of the input is a multiple of `2 ** (len(channels) - 1)`; with `pools`, of 2 to the axis'
    own number.
    """
    return UNet(
        spatial_dims=dimensions,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=channels,
        # MONAI takes a stride per axis too, which its annotation does not say
        strides=strides(len(channels), dimensions, pools),  # type: ignore[arg-type]
        num_res_units=residual_units,
        norm=norm_layer(norm, groups, (*channels, out_channels)),
        dropout=dropout,
    )


def basic_unet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Annotated[tuple[Width, ...], Field(min_length=6, max_length=6)] = (8, 8, 16, 32, 64, 8),
    norm: Norm = "instance",
    groups: Width = 1,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """Plain U-Net (Falk et al., Nature Methods 2019): two convolutions a level, at full resolution first.

    `channels`: five levels of the encoder, then the last layer. Sides are multiples of 16.
    """
    return BasicUNet(
        spatial_dims=dimensions,
        in_channels=in_channels,
        out_channels=out_channels,
        features=channels,
        norm=norm_layer(norm, groups, channels),
        dropout=dropout,
    )


def dyn_unet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Widths = (16, 32, 64, 128),
    pools: Halvings | None = None,
    norm: Norm = "instance",
    groups: Width = 1,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """The U-Net of nnU-Net (Isensee et al., Nature Methods 2021), without deep supervision.

    Sides and `pools` as for `unet`.
    """
    down = strides(len(channels), dimensions, pools)
    return DynUNet(
        spatial_dims=dimensions,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=[3] * len(channels),
        strides=[(1,) * dimensions, *down],
        upsample_kernel_size=down,
        filters=channels,
        norm_name=norm_layer(norm, groups, channels),
        dropout=dropout or None,
    )
