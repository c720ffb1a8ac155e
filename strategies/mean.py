"""Averages of the sites' models, or of a part of them: FedAvg, FedProx, FedBN, FedPer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import nn

from conf.table import STRICT
from strategies.base import Correct, Local, Strategy, Study, Tensors
from strategies.protocol import Tree
from strategies.transfer import matching


@dataclass(frozen=True)
class FedAvg(Strategy):
    """The weighted mean of the sites' changes (McMahan et al., 2017, arXiv:1602.05629)."""

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class FedProx(Strategy):
    """FedAvg with a pull towards the round's model (Li et al., 2020, arXiv:1812.06127, eq. 2).

    The term μ/2 ‖w − w⁰‖² enters as its gradient, after clipping: inside the loss it would be clipped.
    """

    __pydantic_config__ = STRICT
    mu: Annotated[float, Ge(0)] = 0.01

    def correction(self, local: Local, start: Tensors) -> Correct:
        def pull(parameters: Mapping[str, nn.Parameter]) -> None:
            for name, p in parameters.items():
                if p.grad is not None:
                    p.grad.add_(p.detach() - start[name], alpha=self.mu)

        return pull


class _Homely(Strategy):
    """FedAvg of all but some tensors, which each site trains and keeps."""

    stateful = True
    whole = False

    def home(self, study: Study) -> frozenset[str]:
        """Names of what stays at the site."""
        raise NotImplementedError

    def shared(self, study: Study) -> tuple[str, ...]:
        home = self.home(study)
        return tuple(name for name in super().shared(study) if name not in home)

    def remember(self, local: Local, trained: Tensors) -> Tree:
        home = self.home(local.study) - local.study.frozen
        return {"private": {name: trained[name] for name in sorted(home & trained.keys())}}


@dataclass(frozen=True)
class FedBN(_Homely):
    """FedAvg of all but the normalisation layers, which stay home (Li et al., 2021, arXiv:2102.07623)."""

    __pydantic_config__ = STRICT

    def home(self, study: Study) -> frozenset[str]:
        return study.norms


@dataclass(frozen=True)
class FedPer(_Homely):
    """FedAvg of all but the layers named here, which stay home (Arivazhagan et al., 2019, arXiv:1912.00818).

    The paper keeps the last layers; any may be kept, such as a GAN's discriminator.

    Attributes:
        keep: patterns of tensor names.
    """

    __pydantic_config__ = STRICT
    keep: tuple[str, ...] = ()

    def home(self, study: Study) -> frozenset[str]:
        return matching(self.keep, list(study.initial), "strategy.keep")
