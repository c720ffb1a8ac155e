"""Residual networks for images, 2D and 3D."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal

from monai.networks.nets.resnet import ResNet
from pydantic import Field
from torch import nn

from tasks.networks.norms import swap_norms
from tasks.networks.trunk import Mean, Trunk
from tasks.networks.unet import Dimensions, Width

Depths = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=4, max_length=4)]
FourWidths = Annotated[tuple[Width, ...], Field(min_length=4, max_length=4)]
Odd = Literal[1, 3, 5, 7]


def resnet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    block: Literal["basic", "bottleneck"] = "basic",
    blocks: Depths = (1, 1, 1, 1),
    channels: FourWidths = (16, 32, 64, 128),
    stem: Odd = 7,
    groups: Width = 8,
) -> nn.Module:
    """Residual network (He et al., 2016, arXiv:1512.03385) with group norms; it halves each side five times.

    ResNet-18 is `blocks=[2,2,2,2] channels=[64,128,256,512]`, ResNet-50 `block=bottleneck blocks=[3,4,6,3]`.

    Args:
        blocks, channels: of the four levels. stem: side of the first filters.
        groups: at most so many in a norm.
    """
    net = ResNet(
        block,
        list(blocks),
        list(channels),
        spatial_dims=dimensions,
        n_input_channels=in_channels,
        conv1_t_size=stem,
        conv1_t_stride=2,
        num_classes=out_channels,
        bias_downsample=False,
    )
    swap_norms(net, groups)  # it does not pass the name of a norm on to its blocks
    names = ("conv1", "bn1", "act", "maxpool", "layer1", "layer2", "layer3", "layer4")
    body = nn.Sequential(OrderedDict((name, net.get_submodule(name)) for name in names))
    head = net.get_submodule("fc")
    return Trunk(body, Mean(), head, channels[-1] * (4 if block == "bottleneck" else 1))
