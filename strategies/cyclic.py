"""Cyclic transfer: the model travels from site to site."""

from __future__ import annotations

from dataclasses import dataclass

from conf.table import STRICT
from strategies.base import Abandon, Ask, Round, Strategy, Study, Tensors, moved
from strategies.exact import Total
from strategies.protocol import Tree


@dataclass(frozen=True)
class Cyclic(Strategy):
    """Cyclic weight transfer (Chang et al., 2018, doi:10.1093/jamia/ocy017): one ask per site, in order.

    A site that does not answer is passed over.
    """

    __pydantic_config__ = STRICT

    def round(self, r: int, state: Tree, model: Tensors, study: Study, sites: tuple[str, ...]) -> Round:
        visited = 0
        for position, site in enumerate(sites):
            ask = Ask(
                (site,),
                f"train/{position}",
                self.down(state, model, study),
                self.spec(study, "train"),
                self.fold(),
                least=0,
            )
            folded = yield ask
            if isinstance(folded, Total) and folded.count:
                model = moved(model, folded)
                visited += 1
        if visited < study.plan.federation.min_replies:
            raise Abandon(f"{visited} of {len(sites)} sites answered")
        return model, state
