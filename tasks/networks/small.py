"""Small convolutional networks: for small data, and for DP."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from monai.networks.layers.factories import Conv, Pool
from pydantic import Field
from torch import nn

from tasks.networks.norms import Standardised, group_norm
from tasks.networks.trunk import Mean, Trunk, dense, grid
from tasks.networks.unet import Dimensions, Fraction, Width

TwoWidths = Annotated[tuple[Width, ...], Field(min_length=2, max_length=2)]
Levels = Annotated[tuple[Width, ...], Field(min_length=1, max_length=5)]
Cells = Annotated[int, Field(ge=1, le=8)]
ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU, "elu": nn.ELU}
Activation = Literal["tanh", "relu", "silu", "elu"]

#: AlexNet's kernel, stride, and whether a maximum follows
_ALEXNET = ((11, 4, True), (5, 1, True), (3, 1, False), (3, 1, False), (3, 1, True))


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
    channels: Levels = (16,),
    activation: Activation = "tanh",
    cells: Cells = 7,
) -> nn.Module:
    """Small network for DP without normalised activations: standardised filters, tanh, a grid of means.

    After Tramèr and Boneh (2021, arXiv:2011.11660) and Papernot et al. (2021, arXiv:2007.14191: tanh bounds
    what one patient's gradient can be). As it stands it has one layer: the noise of DP grows with the number
    of parameters, and a coarse grid of learnt edges learns more under it than a deep network. Give it small
    images (28 to 56 pixels).

    Args:
        channels: of each level, which halves the sides; without DP `[16,32,64]` is better.
        cells: of the grid of means at the end, along each axis; 1: a mean over all.
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


def alexnet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Annotated[tuple[Width, ...], Field(min_length=5, max_length=5)] = (24, 48, 64, 64, 48),
    hidden: TwoWidths = (128, 128),
    cells: Cells = 2,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """AlexNet (Krizhevsky et al., NIPS 2012) with fewer filters and without its local response norm.

    Args:
        hidden: fully connected layers. cells: of the grid of means before them, along each axis.
    """
    conv = Conv["CONV", dimensions]
    body = nn.Sequential()
    layers = zip(pairwise((in_channels, *channels)), _ALEXNET, strict=True)
    for (before, after), (kernel, stride, pooled) in layers:
        body.extend([conv(before, after, kernel, stride=stride, padding=kernel // 2), nn.ReLU()])
        if pooled:
            body.append(Pool["MAX", dimensions](3, stride=2, padding=1))
    features = channels[-1] * cells**dimensions
    head = dense(features, hidden, out_channels, nn.ReLU, dropout)
    return Trunk(body, grid(cells, dimensions), head, features)


def vgg(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    channels: Levels = (8, 16, 32, 64, 64),
    convolutions: Annotated[int, Field(ge=1, le=4)] = 1,
    hidden: Annotated[tuple[Width, ...], Field(max_length=3)] = (64,),
    cells: Cells = 1,
    groups: Width = 8,
    dropout: Fraction = 0.0,
) -> nn.Module:
    """VGG (Simonyan and Zisserman, 2015, arXiv:1409.1556) with group norms.

    Args:
        channels: of each level, which ends in a maximum over 2. convolutions: of each level.
        hidden: fully connected layers. cells: of the grid of means before them, along each axis.
        groups: at most so many in a norm.
    """
    conv, halve = Conv["CONV", dimensions], Pool["MAX", dimensions]
    body = nn.Sequential()
    for before, after in pairwise((in_channels, *channels)):
        for i in range(convolutions):
            layer = conv(after if i else before, after, 3, padding=1, bias=False)
            body.extend([layer, group_norm(after, groups), nn.ReLU()])
        body.append(halve(2))
    features = channels[-1] * cells**dimensions
    head = dense(features, hidden, out_channels, nn.ReLU, dropout)
    return Trunk(body, grid(cells, dimensions), head, features)
