"""SCAFFOLD: control variates at both ends take the drift out of heterogeneous sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from conf.table import STRICT
from strategies.base import Local, Strategy, Study, Tensors
from strategies.exact import Folded, Sum, Total
from strategies.protocol import Tree, Update


@dataclass(frozen=True)
class Scaffold(Strategy):
    """Karimireddy et al., 2020 (arXiv:1910.06378), Algorithm 1.

    A site's new control is the mean of its own (uncorrected) gradients along the round: for plain SGD
    this *is* option II, cᵢ − c + (x − yᵢ) / (K η), and it stays right with momentum, clipping or Adam.
    Controls count sites, not patients: c = mean of all cᵢ over all N sites, whoever took part. So it ends
    at the optimum of the mean of the sites' losses, also where sites differ in size.
    """

    __pydantic_config__ = STRICT
    stateful = True
    lr: Annotated[float, Gt(0)] = 1.0

    def groups(self, study: Study) -> dict[str, tuple[str, ...]]:
        return {**super().groups(study), "control": tuple(n for n in study.initial if n in study.trainable)}

    def fold(self) -> Sum:
        return Sum(counted=frozenset({"control"}))

    def start(self, study: Study, sites: tuple[str, ...]) -> Tree:
        return {"control": self._zeros(study), "sites": len(sites)}

    def down(self, state: Tree, model: Tensors, study: Study) -> Tree:
        return {**super().down(state, model, study), "control": state["control"]}

    def apply(self, folded: Folded, state: Tree, model: Tensors, study: Study) -> tuple[Tensors, Tree]:
        if not isinstance(folded, Total):
            raise TypeError("SCAFFOLD needs a Sum")
        delta, control = folded.mean("delta"), folded.mean("control")
        share = folded.count / state["sites"]
        return (
            {n: torch.add(t, delta[n], alpha=self.lr) if n in delta else t for n, t in model.items()},
            {**state, "control": {n: c + share * control[n] for n, c in state["control"].items()}},
        )

    def learn(self, local: Local) -> tuple[Update, Tree]:
        old = local.place(local.state.get("control") or self._zeros(local.study))
        shift = {n: c - old[n] for n, c in local.place(local.common["control"]).items()}
        seen = {n: torch.zeros_like(t, dtype=torch.float64) for n, t in old.items()}
        steps: dict[str, int] = dict.fromkeys(old, 0)

        def steer(parameters: Mapping[str, nn.Parameter]) -> None:
            for name, p in parameters.items():
                if p.grad is not None:
                    seen[name] += p.grad
                    steps[name] += 1
                    p.grad.add_(shift[name])

        start = self.weights(local)
        trained = local.fit(start, correct=steer)
        new = {n: (g / max(1, steps[n])).float() for n, g in seen.items()}
        update = self.report(local, start, trained)
        change: dict[str, Tensor] = {f"control/{n}": new[n] - old[n] for n in new}
        return Update({**update.tensors, **change}, update.weight), {"control": new}

    @staticmethod
    def _zeros(study: Study) -> Tensors:
        return {n: torch.zeros_like(t) for n, t in study.initial.items() if n in study.trainable}
