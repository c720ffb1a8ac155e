"""Personal models beside the shared one: Ditto."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge
from torch import nn

from conf.table import STRICT
from strategies.base import Local, Strategy, Tensors
from strategies.protocol import Tree, Update


@dataclass(frozen=True)
class Ditto(Strategy):
    """Li et al., 2021 (arXiv:2012.04221), Algorithm 1: FedAvg, and at each site a model of its own.

    The personal model v is trained on the site's loss plus λ/2 ‖v − w‖², w being the round's shared model.
    It never leaves the site.
    """

    __pydantic_config__ = STRICT
    stateful = True
    personalises = True
    whole = False
    fits = 2
    lam: Annotated[float, Ge(0)] = 0.1

    def learn(self, local: Local) -> tuple[Update, Tree]:
        update, _ = super().learn(local)
        shared = self.weights(local)

        def pull(parameters: Mapping[str, nn.Parameter]) -> None:
            for name, p in parameters.items():
                if p.grad is not None:
                    p.grad.add_(p.detach() - shared[name], alpha=self.lam)

        mine = local.fit(self.personal(local) or shared, correct=pull, purpose="personal")
        return update, {"personal": mine}

    def personal(self, local: Local) -> Tensors | None:
        mine: Tensors | None = local.state.get("personal")
        return mine
