"""Averages of the sites' models: FedAvg, FedProx, FedBN."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import nn

from conf.table import STRICT
from strategies.base import Correct, Local, Strategy, Study, Tensors
from strategies.protocol import Tree


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


@dataclass(frozen=True)
class FedBN(Strategy):
    """FedAvg of all but the normalisation layers, which stay home (Li et al., 2021, arXiv:2102.07623)."""

    __pydantic_config__ = STRICT
    stateful = True

    def shared(self, study: Study) -> tuple[str, ...]:
        return tuple(name for name in super().shared(study) if name not in study.norms)

    def keep(self, local: Local, trained: Tensors) -> Tree:
        return {"private": {name: trained[name] for name in sorted(local.study.norms & trained.keys())}}
