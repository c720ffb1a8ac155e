"""Residual networks for images, 2D and 3D."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Literal

from monai.networks.blocks.squeeze_and_excitation import ChannelSELayer
from monai.networks.layers.factories import Conv
from monai.networks.nets.resnet import ResNet
from pydantic import Field
from torch import Tensor, nn

from tasks.networks.norms import Standardised, group_norm, swap_norms
from tasks.networks.trunk import Mean, Trunk
from tasks.networks.unet import Dimensions, Width

Depth = Annotated[int, Field(ge=1, le=64)]
Depths = Annotated[tuple[Depth, ...], Field(min_length=4, max_length=4)]
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


class Residual(nn.Module):
    """Norm, activation, convolution, twice, beside a shortcut (He et al., 2016, arXiv:1603.05027).

    Args:
        stride: of the first convolution. groups: at most so many in a norm.
        squeeze: reduction of the squeeze-and-excitation at the end; 0: none.
        convolution: makes one of kernel, stride and widths.
    """

    def __init__(
        self,
        dimensions: int,
        inputs: int,
        outputs: int,
        *,
        stride: int,
        groups: int,
        convolution: Callable[..., nn.Module],
        squeeze: int = 0,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(inputs, groups)
        self.conv1 = convolution(dimensions, inputs, outputs, kernel=3, stride=stride)
        self.norm2 = group_norm(outputs, groups)
        self.conv2 = convolution(dimensions, outputs, outputs, kernel=3, stride=1)
        self.excite = ChannelSELayer(dimensions, outputs, squeeze) if squeeze else nn.Identity()
        same = stride == 1 and inputs == outputs
        self.project = None if same else convolution(dimensions, inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        ready = self.norm1(x).relu()
        shortcut = x if self.project is None else self.project(ready)
        out = self.conv2(self.norm2(self.conv1(ready)).relu())
        summed: Tensor = shortcut + self.excite(out)
        return summed


def _residual(
    dimensions: int,
    inputs: int,
    blocks: tuple[int, ...],
    channels: tuple[int, ...],
    groups: int,
    *,
    convolution: Callable[..., nn.Module],
    squeeze: int = 0,
) -> nn.Sequential:
    """A stem that halves the sides, then levels of `Residual`, each but the first halving them again."""
    body = nn.Sequential(convolution(dimensions, inputs, channels[0], kernel=5, stride=2))
    before = channels[0]
    for level, (count, width) in enumerate(zip(blocks, channels, strict=True)):
        for i in range(count):
            body.append(
                Residual(
                    dimensions,
                    before,
                    width,
                    stride=2 if i == 0 and level else 1,
                    groups=groups,
                    convolution=convolution,
                    squeeze=squeeze,
                )
            )
            before = width
    body.extend([group_norm(before, groups), nn.ReLU()])
    return body


def _plain(dimensions: int, inputs: int, outputs: int, *, kernel: int, stride: int) -> nn.Module:
    layer: nn.Module = Conv["CONV", dimensions](
        inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False
    )
    return layer


def senet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    blocks: Depths = (1, 1, 1, 1),
    channels: FourWidths = (16, 32, 64, 128),
    squeeze: Annotated[int, Field(ge=1, le=64)] = 4,
    groups: Width = 8,
) -> nn.Module:
    """Residual network with squeeze-and-excitation (Hu et al., 2018, arXiv:1709.01507).

    Args:
        blocks, channels: of the four levels. squeeze: how many times fewer the inner numbers are.
        groups: at most so many in a norm.
    """
    body = _residual(dimensions, in_channels, blocks, channels, groups, convolution=_plain, squeeze=squeeze)
    return Trunk(body, Mean(), nn.Linear(channels[-1], out_channels), channels[-1])


def ws_resnet(
    *,
    in_channels: Width,
    out_channels: Width,
    dimensions: Dimensions,
    blocks: Annotated[tuple[Depth, ...], Field(min_length=1, max_length=4)] = (1, 1, 1),
    channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=4)] = (16, 32, 64),
    groups: Width = 16,
) -> nn.Module:
    """Residual network with standardised filters and group norms, as De et al. (2022, arXiv:2204.13650) use
    under DP. Their WRN-16-4 is `blocks=[2,2,2] channels=[64,128,256]` but for the first layer's stride.

    Args:
        blocks, channels: of the levels. groups: at most so many in a norm.

    Raises:
        ValueError: not as many `blocks` as `channels`.
    """
    if len(blocks) != len(channels):
        raise ValueError(
            f"model.blocks has {len(blocks)} levels and model.channels {len(channels)}; give one each"
        )
    body = _residual(dimensions, in_channels, blocks, channels, groups, convolution=Standardised)
    return Trunk(body, Mean(), nn.Linear(channels[-1], out_channels), channels[-1])
