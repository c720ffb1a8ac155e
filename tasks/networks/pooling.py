"""Pools over the instances of a bag: slices of a volume, views of a study, tiles of a slide, points in time.

Each is a module from `B N F` and a mask `B N` (true where there is an instance; at least one in each bag) to
`B features`. What stands at places without an instance, NaN too, changes nothing.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

Size = Annotated[int, Field(ge=1, le=65536)]
Share = Annotated[float, Field(ge=0, le=1)]
Shares = Annotated[tuple[Share, ...], Field(min_length=1, max_length=64)]


class InstancePool(nn.Module):
    """What all pools are.

    Attributes:
        features: numbers of a bag.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, instances: Tensor, mask: Tensor) -> Tensor:
        """`B N F` and `B N` to `B features`."""
        return self.join(instances.masked_fill(~mask.unsqueeze(2), 0.0), mask)

    def join(self, instances: Tensor, mask: Tensor) -> Tensor:
        """The same, with zeros where there is no instance."""
        raise NotImplementedError


class MeanPool(InstancePool):
    """The mean over instances."""

    def join(self, instances: Tensor, mask: Tensor) -> Tensor:
        return instances.sum(1) / mask.sum(1, keepdim=True)


class MaxPool(InstancePool):
    """The largest value of each feature."""

    def join(self, instances: Tensor, mask: Tensor) -> Tensor:
        return instances.masked_fill(~mask.unsqueeze(2), -torch.inf).amax(1)


class AttentionPool(InstancePool):
    """A mean whose weights are learnt from each instance (Ilse et al., 2018, arXiv:1802.04712).

    The weights say what a bag's score rests on: `weights` gives them.

    Args:
        hidden: of the layer that weighs. gated: equation 9, else equation 8.
    """

    def __init__(self, features: int, hidden: int, gated: bool) -> None:
        super().__init__(features)
        self.look = nn.Linear(features, hidden)
        self.gate = nn.Linear(features, hidden) if gated else None
        self.weigh = nn.Linear(hidden, 1, bias=False)

    def weights(self, instances: Tensor, mask: Tensor) -> Tensor:
        """`B N`, sum 1 over a bag's instances."""
        seen = self.look(instances).tanh()
        if self.gate is not None:
            seen = seen * self.gate(instances).sigmoid()
        scores: Tensor = self.weigh(seen).squeeze(2)
        return scores.masked_fill(~mask, -torch.inf).softmax(1)

    def join(self, instances: Tensor, mask: Tensor) -> Tensor:
        return (self.weights(instances, mask).unsqueeze(2) * instances).sum(1)


class QuantilePool(InstancePool):
    """Fixed quantiles of each feature over the instances, one after the other.

    As Couture et al. (MICCAI 2018, arXiv:1806.05083) pool the tiles of a slide. Between instances they
    are interpolated (numpy's and R's default, type 7 of Hyndman and Fan, 1996).
    """

    def __init__(self, features: int, shares: tuple[float, ...]) -> None:
        super().__init__(features * len(shares))
        self._shares = shares

    def join(self, instances: Tensor, mask: Tensor) -> Tensor:
        ranked = instances.masked_fill(~mask.unsqueeze(2), torch.inf).sort(1).values
        ranked = ranked.masked_fill(~mask.sort(1, descending=True).values.unsqueeze(2), 0.0)
        steps = mask.sum(1).to(instances.dtype) - 1
        place = torch.stack([share * steps for share in self._shares], 1)
        # weights of a hat over each place: no reading of values, so it maps
        index = torch.arange(mask.shape[1], device=mask.device, dtype=instances.dtype)
        hats = (1 - (place.unsqueeze(2) - index).abs()).clamp(min=0)
        return (hats @ ranked).flatten(1)


class SequencePool(InstancePool):
    """The last state of an LSTM over the instances in their order (Hochreiter and Schmidhuber, 1997).

    The state stays as it is where there is no instance. (An LSTM is mapped over patients, a GRU is not.)
    """

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__(hidden)
        self.cell = nn.LSTMCell(features, hidden)

    def join(self, instances: Tensor, mask: Tensor) -> Tensor:
        state = memory = instances.new_zeros(instances.shape[0], self.features)
        for i in range(instances.shape[1]):
            there = mask[:, i].unsqueeze(1)
            after = self.cell(instances[:, i], (state, memory))
            state, memory = (
                torch.where(there, new, old) for new, old in zip(after, (state, memory), strict=True)
            )
        return state


def mean(*, features: Size) -> InstancePool:
    """The mean over instances."""
    return MeanPool(features)


def maximum(*, features: Size) -> InstancePool:
    """The largest value of each feature: one instance is enough."""
    return MaxPool(features)


def attention(*, features: Size, hidden: Size = 64) -> InstancePool:
    """A learnt weighted mean; `hidden`: of the layer that weighs."""
    return AttentionPool(features, hidden, gated=False)


def gated_attention(*, features: Size, hidden: Size = 64) -> InstancePool:
    """A learnt weighted mean with a gate, which tells apart what tanh makes alike."""
    return AttentionPool(features, hidden, gated=True)


def quantiles(*, features: Size, shares: Shares = (0.0, 0.25, 0.5, 0.75, 1.0)) -> InstancePool:
    """Quantiles at `shares` of each feature."""
    return QuantilePool(features, shares)


def lstm(*, features: Size, hidden: Size = 64) -> InstancePool:
    """The last state, of `hidden` numbers, of an LSTM over the instances."""
    return SequencePool(features, hidden)
