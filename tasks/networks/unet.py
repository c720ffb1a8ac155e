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


def unet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Widths = (16, 32, 64, 128),
    residual_units: Annotated[int, Field(ge=0, le=4)] = 2,
    norm: Norm = "instance",
    groups: Width = 1,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """Residual U-Net (Kerfoot et al., STACOM 2018), which strides before it convolves: fast on a CPU.

    Every side of the input is a multiple of `2 ** (len(channels) - 1)`.
    """
    return UNet(
        spatial_dims=dimensions,
        in_channels=in_channels,
        out_channels=out_channels,
        channels=channels,
        strides=(2,) * (len(channels) - 1),
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
    norm: Norm = "instance",
    groups: Width = 1,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """The U-Net of nnU-Net (Isensee et al., Nature Methods 2021), without deep supervision.

    Every side of the input is a multiple of `2 ** (len(channels) - 1)`.
    """
    down = [2] * (len(channels) - 1)
    return DynUNet(
        spatial_dims=dimensions,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=[3] * len(channels),
        strides=[1, *down],
        upsample_kernel_size=down,
        filters=channels,
        norm_name=norm_layer(norm, groups, channels),
        dropout=dropout or None,
    )
