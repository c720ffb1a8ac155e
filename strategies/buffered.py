"""Buffered asynchrony: the model moves as soon as a few answers are in, however old the rest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from annotated_types import Ge

from conf.table import STRICT
from strategies.base import Ask, Strategy, Study, Tensors
from strategies.exact import Sum
from strategies.protocol import Tree


@dataclass(frozen=True)
class FedBuff(Strategy):
    """Nguyen et al., 2022 (arXiv:2106.06639): a round ends with the first `buffer` answers.

    The others go on training from the model they were given; their answers count in a later round,
    `age` rounds old, with (1 + age)^-power of their weight. Sites that are still busy are not asked.
    """

    __pydantic_config__ = STRICT
    buffer: Annotated[int, Ge(1)] = 2
    power: Annotated[float, Ge(0)] = 0.5

    def fold(self) -> Sum:
        return Sum(age_power=self.power)

    def train(self, state: Tree, model: Tensors, study: Study, sites: tuple[str, ...]) -> Ask:
        return replace(super().train(state, model, study, sites), need=min(self.buffer, len(sites)))
