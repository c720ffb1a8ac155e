"""EfficientNet of MONAI, with group norms."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated

from monai.networks.nets.efficientnet import EfficientNet
from pydantic import Field
from torch import nn

from tasks.networks.norms import swap_norms
from tasks.networks.trunk import Mean, Trunk
from tasks.networks.unet import Dimensions, Width

#: repeats, kernel, stride, expansion, filters in and out, squeeze-and-excitation (table 1 of the paper)
_LEVELS = (
    "r1_k3_s11_e1_i32_o16_se0.25",
    "r2_k3_s22_e6_i16_o24_se0.25",
    "r2_k5_s22_e6_i24_o40_se0.25",
    "r3_k3_s22_e6_i40_o80_se0.25",
    "r3_k5_s11_e6_i80_o112_se0.25",
    "r4_k5_s22_e6_i112_o192_se0.25",
    "r1_k3_s11_e6_i192_o320_se0.25",
)


def efficientnet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    width: Annotated[float, Field(ge=0.1, le=4)] = 0.5,
    depth: Annotated[float, Field(ge=0.1, le=4)] = 0.5,
    groups: Width = 8,
) -> nn.Module:
    """EfficientNet (Tan and Le, 2019, arXiv:1905.11946) without stochastic depth; B0 is `width=1 depth=1`.

    Args:
        width, depth: factors on the filters and layers of B0. groups: at most so many in a norm.
    """
    net = EfficientNet(
        list(_LEVELS),
        dimensions,
        in_channels,
        out_channels,
        width_coefficient=width,
        depth_coefficient=depth,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    net.set_swish(memory_efficient=False)  # the other has a gradient of its own, which cannot be mapped
    swap_norms(net, groups)
    names = (
        "conv_stem_padding",
        "conv_stem",
        "bn0",
        "swish",
        "blocks",
        "conv_head_padding",
        "conv_head",
        "bn1",
    )
    layers = OrderedDict((name, net.get_submodule(f"_{name}")) for name in names)
    features = net.get_submodule("_conv_head").out_channels
    if not isinstance(features, int):
        raise TypeError("MONAI has changed its EfficientNet")
    body = nn.Sequential(OrderedDict(**layers, last=nn.SiLU()))
    return Trunk(body, Mean(), net._fc, net._fc.in_features)
