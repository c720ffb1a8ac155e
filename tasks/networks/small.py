"""Small convolutional networks without activations normalised: for small data, and for DP."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from monai.networks.layers.factories import Conv, Pool
from pydantic import Field
from torch import nn

from tasks.networks.norms import Standardised
from tasks.networks.trunk import Mean, Trunk, dense, grid
from tasks.networks.unet import Dimensions, Fraction, Width

TwoWidths = Annotated[tuple[Width, ...], Field(min_length=2, max_length=2)]
Levels = Annotated[tuple[Width, ...], Field(min_length=1, max_length=5)]
Cells = Annotated[int, Field(ge=1, le=8)]
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU, "elu": nn.ELU}
Activation = Literal["tanh", "relu", "silu", "elu"]


def lenet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: TwoWidths = (6, 16),
    hidden: TwoWidths = (120, 84),
    cells: Cells = 5,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """LeNet-5 (LeCun et al., Proceedings of the IEEE 1998) on images of any size: a grid of means at the end.

    Args:
        hidden: fully connected layers. cells: of the grid, along each axis.
    """
    conv, halve = Conv["CONV", dimensions], Pool["AVG", dimensions]
    body = nn.Sequential()
    for before, after in pairwise((in_channels, *channels)):
        body.extend([conv(before, after, 5, padding=2), nn.Tanh(), halve(2)])
    features = channels[-1] * cells**dimensions
    return Trunk(
        body, grid(cells, dimensions), dense(features, hidden, out_channels, nn.Tanh, dropout), features
    )


def convnet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Levels = (16, 32, 64),
    activation: Activation = "tanh",
    cells: Cells = 1,
) -> nn.Module:
    """Small normalisation-free network for DP: standardised filters, bounded activations.

    After Tramèr and Boneh (2021, arXiv:2011.11660) and Papernot et al. (2021, arXiv:2007.14191: tanh bounds
    what one patient's gradient can be); few parameters, because the noise grows with their number.

    Args:
        channels: of each level, which halves the sides.
        cells: of the grid of means at the end, along each axis.
    """
    body = nn.Sequential()
    for before, after in pairwise((in_channels, *channels)):
        kernel = 5 if not len(body) else 3
        body.extend(
            [
                Standardised(dimensions, before, after, kernel=kernel, stride=2),
                ACTIVATIONS[activation](),
            ]
        )
    features = channels[-1] * cells**dimensions
    pool = Mean() if cells == 1 else grid(cells, dimensions)
    return Trunk(body, pool, nn.Linear(features, out_channels), features)
