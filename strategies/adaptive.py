"""A server optimiser on the mean change: FedAdam."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt

from conf.table import STRICT
from strategies.base import Strategy, Study, Tensors
from strategies.exact import Folded, Total
from strategies.protocol import Tree


@dataclass(frozen=True)
class FedAdam(Strategy):
    """Adam on the mean change (Reddi et al., 2021, arXiv:2003.00295, Algorithm 2, without bias correction).

    Only parameters are stepped; float buffers (running statistics) take the plain mean.
    """

    __pydantic_config__ = STRICT
    lr: Annotated[float, Gt(0)] = 0.01
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.99
    tau: Annotated[float, Gt(0)] = 1e-3

    def start(self, study: Study, sites: tuple[str, ...]) -> Tree:
        def zeros() -> Tensors:
            return {n: torch.zeros_like(t) for n, t in study.initial.items() if n in study.trainable}

        return {"m": zeros(), "v": {n: t + self.tau**2 for n, t in zeros().items()}}

    def apply(self, folded: Folded, state: Tree, model: Tensors, study: Study) -> tuple[Tensors, Tree]:
        if not isinstance(folded, Total):
            raise TypeError("FedAdam needs a Sum")
        mean = folded.mean("delta")
        moved, m, v = dict(model), {}, {}
        for name in mean:
            delta = mean[name]
            if name not in study.trainable:
                moved[name] = model[name] + delta
                continue
            m[name] = torch.lerp(delta, state["m"][name], self.beta1)
            v[name] = torch.lerp(delta.square(), state["v"][name], self.beta2)
            moved[name] = model[name] + self.lr * m[name] / (v[name].sqrt() + self.tau)
        return moved, {"m": m, "v": v}
