"""U-Nets of MONAI, 2D and 3D, with norms that look at one example at a time."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from monai.networks.nets.basic_unet import BasicUNet
from monai.networks.nets.basic_unetplusplus import BasicUNetPlusPlus
from monai.networks.nets.dynunet import DynUNet
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.unet import UNet
from pydantic import Field
from torch import Tensor, nn

Dimensions = Literal[2, 3]
Width = Annotated[int, Field(ge=1, le=4096)]
Widths = Annotated[tuple[Width, ...], Field(min_length=2, max_length=8)]
Halvings = Annotated[tuple[Annotated[int, Field(ge=0, le=7)], ...], Field(min_length=2, max_length=3)]
SixWidths = Annotated[tuple[Width, ...], Field(min_length=6, max_length=6)]
Sides = Annotated[int, Field(ge=0, le=5)]
Blocks = Annotated[int, Field(ge=1, le=8)]
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
    channels: SixWidths = (8, 8, 16, 32, 64, 8),
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


class _DynUNet(DynUNet):
    """MONAI's, with its side outputs as a tuple."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        made: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        # left in the list they would keep the graph alive, and a network with a graph cannot be copied
        self.heads[:] = [torch.empty(0)] * len(self.heads)
        return made.unbind(1) if self.training and self.deep_supervision else made


def dyn_unet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Annotated[tuple[Width, ...], Field(min_length=3, max_length=8)] = (16, 32, 64, 128),
    pools: Halvings | None = None,
    deep_supervision: Sides = 0,
    norm: Norm = "instance",
    groups: Width = 1,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """The U-Net of nnU-Net (Isensee et al., Nature Methods 2021).

    `deep_supervision`: levels below the first that give logits too in training. Sides and `pools` as for
    `unet`.

    Raises:
        ValueError: more of them than there are levels between the first and the last.
    """
    if deep_supervision > len(channels) - 2:
        raise ValueError(
            f"model.deep_supervision is {deep_supervision}; {len(channels)} levels have at most "
            f"{len(channels) - 2} between the first and the last"
        )
    down = strides(len(channels), dimensions, pools)
    return _DynUNet(
        spatial_dims=dimensions,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=[3] * len(channels),
        strides=[(1,) * dimensions, *down],
        upsample_kernel_size=down,
        filters=channels,
        norm_name=norm_layer(norm, groups, channels),
        dropout=dropout or None,
        deep_supervision=deep_supervision > 0,
        deep_supr_num=max(1, deep_supervision),
    )


class _PlusPlus(BasicUNetPlusPlus):
    """MONAI's, the deepest node's logits first."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        made: list[Tensor] = super().forward(x)
        return tuple(reversed(made)) if self.training and self.deep_supervision else made[-1]


def unet_plus_plus(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: SixWidths = (8, 8, 16, 32, 64, 8),
    deep_supervision: bool = False,
    norm: Norm = "instance",
    groups: Width = 1,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """UNet++ (Zhou et al., 2018, arXiv:1807.10165): nested decoders on one encoder.

    `channels` and sides as for `basic_unet`; with `deep_supervision` the four decoders of full resolution
    are all trained.
    """
    return _PlusPlus(
        spatial_dims=dimensions,
        in_channels=in_channels,
        out_channels=out_channels,
        features=channels,
        deep_supervision=deep_supervision,
        norm=norm_layer(norm, groups, channels),
        dropout=dropout,
    )


def seg_res_net(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    width: Width = 8,
    blocks: Annotated[tuple[Blocks, ...], Field(min_length=2, max_length=6)] = (1, 2, 2, 4),
    norm: Norm = "group",
    groups: Width = 8,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """SegResNet (Myronenko, 2018, arXiv:1810.11654), without its autoencoder: a wide encoder, a thin decoder.

    `width` at full resolution, doubled with each level; `blocks` of each. Sides are multiples of
    `2 ** (len(blocks) - 1)`.
    """
    return SegResNet(
        spatial_dims=dimensions,
        init_filters=width,
        in_channels=in_channels,
        out_channels=out_channels,
        dropout_prob=dropout or None,
        norm=norm_layer(norm, groups, (width,)),
        blocks_down=blocks,
        blocks_up=(1,) * (len(blocks) - 1),
        upsample_mode="deconv",
    )
