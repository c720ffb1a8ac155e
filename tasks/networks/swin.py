"""MONAI's U-Net over a hierarchical transformer whose attention stays in shifted windows."""

from __future__ import annotations

from typing import Annotated

import torch
from monai.networks.nets.swin_unetr import SwinUNETR
from pydantic import Field
from torch import nn

from tasks.networks.unet import Dimensions, Fraction, Norm, Width, norm_layer

Layers = Annotated[tuple[Annotated[int, Field(ge=1, le=32)], ...], Field(min_length=4, max_length=4)]


def swin_unetr(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    width: Annotated[int, Field(ge=12, le=768, multiple_of=12)] = 12,
    depths: Layers = (2, 2, 2, 2),
    heads: Layers = (3, 6, 12, 24),
    window: Annotated[int, Field(ge=2, le=16)] = 4,
    dropout: Fraction = 0.0,
    norm: Norm = "group",
    groups: Width = 1,
) -> nn.Module:
    """Swin UNETR (Hatamizadeh et al., 2022, arXiv:2201.01266), without its pre-trained weights.

    Args:
        width: of a token at the first level, doubled at each of four. depths, heads: of those levels.
        window: tokens along each axis that see each other.

    Every side of the input is a multiple of 32, and 64 at least where `norm` is `instance`.
    """
    wanted = torch.get_default_device()
    with torch.device("cpu"):  # MONAI reads numbers as it builds, which a device without numbers has not
        made = SwinUNETR(
            in_channels=in_channels,
            out_channels=out_channels,
            spatial_dims=dimensions,
            feature_size=width,
            depths=depths,
            num_heads=heads,
            window_size=window,
            drop_rate=dropout,
            norm_name=norm_layer(norm, groups, (width,)),
        )
    return made.to(wanted)
