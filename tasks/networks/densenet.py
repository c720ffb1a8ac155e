"""Densely connected networks of MONAI, with group norms."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

from monai.networks.nets.densenet import DenseNet
from pydantic import Field
from torch import nn

from tasks.networks.norms import swap_norms
from tasks.networks.trunk import Mean, Trunk
from tasks.networks.unet import Dimensions, Width

Depths = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=4)]


def densenet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    stem: Annotated[int, Field(ge=2, le=256)] = 16,
    growth: Annotated[int, Field(ge=2, le=256)] = 8,
    blocks: Depths = (2, 4, 4, 2),
    bottleneck: Annotated[int, Field(ge=1, le=8)] = 2,
    groups: Width = 8,
) -> nn.Module:
    """DenseNet (Huang et al., 2017, arXiv:1608.06993).

    DenseNet-121 is `stem=64 growth=32 blocks=[6,12,24,16] bottleneck=4`.

    Args:
        stem: filters of the first layer. growth: what each layer adds. blocks: layers of each level.
        bottleneck: inner width of a layer, in units of `growth`.
        groups: at most so many in a norm.
    """
    net = DenseNet(dimensions, in_channels, out_channels, stem, growth, blocks, bottleneck)
    swap_norms(net, groups)
    head = net.get_submodule("class_layers.out")
    features = stem
    for i, layers in enumerate(blocks):
        features = (features if i == 0 else features // 2) + layers * growth
    body = nn.Sequential(OrderedDict(features=net.features, relu=nn.ReLU()))
    return Trunk(body, Mean(), head, features)
