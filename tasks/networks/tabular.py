"""Networks on features: clinical columns, descriptors of an image. `dimensions` is 0."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from tasks.networks.trunk import Trunk, dense
from tasks.networks.unet import Fraction, Width

Features = Annotated[int, Field(ge=1, le=2**24)]
Hidden = Annotated[tuple[Width, ...], Field(min_length=1, max_length=8)]


def linear(*, in_channels: Features, out_channels: Width, dimensions: Literal[0]) -> nn.Module:  # noqa: ARG001
    """One linear layer, which starts at zero: with cross-entropy, logistic regression."""
    head = nn.Linear(in_channels, out_channels)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return Trunk(nn.Identity(), nn.Identity(), head, in_channels)


def mlp(
    *,
    in_channels: Features,
    out_channels: Width,
    dimensions: Literal[0],  # noqa: ARG001
    channels: Hidden = (64,),
    dropout: Fraction = 0.0,
) -> nn.Module:
    """Fully connected layers of `channels` with ReLU between."""
    body = dense(in_channels, channels[:-1], channels[-1], nn.ReLU, dropout)
    body.append(nn.ReLU())
    return Trunk(body, nn.Identity(), nn.Linear(channels[-1], out_channels), channels[-1])
