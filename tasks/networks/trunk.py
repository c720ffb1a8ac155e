"""What every network of shape `vector` is: feature maps, a pool over positions, a head."""

from __future__ import annotations

from collections.abc import Sequence

from monai.networks.layers.factories import Pool
from torch import Tensor, nn


class Trunk(nn.Module):
    """`head(pool(maps(x)))`: `B C H W[D]` to `B K`, or `B F` to `B K` for features.

    A task may put another head (it takes `features` numbers), pool instances before it, join a table to
    `pool(maps(x))`, or look where the last maps were active (CAM, Grad-CAM).

    Attributes:
        body: the image to its last feature maps.
        pool: `B F h w[d]` to `B features`.
        head: `B features` to `B K`.
        features: what the head takes.
    """

    def __init__(self, body: nn.Module, pool: nn.Module, head: nn.Module, features: int) -> None:
        super().__init__()
        self.body = body
        self.pool = pool
        self.head = head
        self.features = features

    def maps(self, x: Tensor) -> Tensor:
        """The last feature maps, `B F h w[d]`; `B F` where the input has no positions."""
        found: Tensor = self.body(x)
        return found

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.maps(x)))
        return logits


class Mean(nn.Module):
    """The mean over positions: `B F h w[d]` to `B F`, for maps of any size."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.flatten(2).mean(2)


def grid(side: int, dimensions: int) -> nn.Module:
    """Means over a grid of `side` cells along each axis: `B F h w[d]` to `B F*side**dimensions`."""
    return nn.Sequential(Pool["ADAPTIVEAVG", dimensions](side), nn.Flatten())


def dense(
    features: int, hidden: Sequence[int], classes: int, activation: type[nn.Module], dropout: float = 0.0
) -> nn.Sequential:
    """Fully connected layers with `activation` (and dropout) after each but the last."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(features, width), activation(), *([nn.Dropout(dropout)] if dropout else [])]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, classes))
