"""Normalisation that looks at one example at a time: group norms, and weights instead of activations."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from monai.networks.layers.factories import Conv
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def group_norm(width: int, groups: int) -> nn.GroupNorm:
    """Group norm (Wu and He, 2018, arXiv:1803.08494) of as many of `groups` groups as divide `width`."""
    return nn.GroupNorm(math.gcd(groups, width), width)


def swap_norms(model: nn.Module, groups: int) -> list[str]:
    """Put a group norm in the place of every batch norm in `model`, and say in which.

    Weight and bias are kept; running statistics are dropped.

    Args:
        groups: at most so many; each layer has the largest common divisor with its width, of vectors one.
    """
    swapped: dict[str, nn.Module] = {}
    made: dict[nn.Module, nn.Module] = {}  # a layer may stand under two names
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, _BatchNorm):
            swapped[name] = made.setdefault(layer, _grouped(layer, groups))
    for name, layer in swapped.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return list(swapped)


def _grouped(old: _BatchNorm, groups: int) -> nn.GroupNorm:
    # of a vector a channel is one value, and a group of one value has no spread
    groups = 1 if isinstance(old, nn.BatchNorm1d) else math.gcd(groups, old.num_features)
    new = nn.GroupNorm(groups, old.num_features, old.eps, old.affine)
    if old.affine:
        new.weight, new.bias = old.weight, old.bias
    return new


class Standardised(nn.Module):
    """A convolution whose filters have mean 0 and variance `1 / fan_in`, times a learnt gain per filter.

    Scaled weight standardisation (Brock et al., 2021, arXiv:2101.08692, equation 1): it keeps the scale of
    activations without a look at any of them, so it couples neither examples nor positions.
    """

    def __init__(
        self,
        dimensions: int,
        inputs: int,
        outputs: int,
        *,
        kernel: int = 3,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        conv = Conv["CONV", dimensions](inputs, outputs, kernel, bias=bias)
        nn.init.kaiming_normal_(conv.weight)
        self.weight = conv.weight
        self.bias = conv.bias
        self.gain = nn.Parameter(torch.ones(outputs, *[1] * (dimensions + 1)))
        self._convolve = {2: F.conv2d, 3: F.conv3d}[dimensions]
        self._stride = stride
        self._padding = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        rows = self.weight.flatten(1)
        variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
        scaled = (rows - mean) / (variance * rows.shape[1] + 1e-4).sqrt()
        return self._convolve(
            x, scaled.view_as(self.weight) * self.gain, self.bias, self._stride, self._padding
        )
