"""The only seam between simulation and deployment: an ask goes out, what was folded comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from strategies.base import Ask
from strategies.exact import Folded
from strategies.protocol import Failure, Instruction, Reply, Tree

Heard = Callable[[str, Failure | None], None]
"""Called once for each site as soon as it is known whether its answer counts."""


@dataclass(frozen=True)
class Order:
    """An ask, made out to its sites.

    Attributes:
        instructions: one for each site to be asked, without the digest of `ask.down`, which the exchange
            adds where it travels.
        known: failures that the journal of an interrupted round already holds: those sites are not asked
            (asynchronous orders have instructions for them too: on a virtual clock failing takes time).
        deadline_s: seconds to wait; 0 = no limit.
    """

    ask: Ask
    round: int
    instructions: Mapping[str, Instruction]
    known: Mapping[str, Failure] = field(default_factory=dict)
    deadline_s: float = 0.0


class Handler(Protocol):
    """Whatever answers for a site: `client.site.Site`, or the far end of a wire."""

    def handle(self, instruction: Instruction, common: Tree) -> Reply: ...


class Exchange(Protocol):
    """Carries an order to the sites, checks and folds what they answer."""

    def __call__(self, order: Order, heard: Heard) -> Folded: ...

    def busy(self) -> frozenset[str]:
        """Sites with a job outstanding (asynchronous asks)."""

    def snapshot(self) -> Tree:
        """Clock and outstanding jobs, as the checkpoint keeps them: scalars only."""

    def restore(self, tree: Tree, run: str) -> None:
        """Go on from a snapshot, which does not hold the run's id: equal runs have equal checkpoints."""

    def close(self) -> None:
        """End what it started."""
