"""A predictor by sums, fitted over a run's sites in a few exchanges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.base import Ask, Tensors
from strategies.exact import Total

if TYPE_CHECKING:
    from server.rounds import Run


def fitted(run: Run, name: str, given: Tensors) -> Tensors:
    """What the predictor knows after its exchanges, `given` from the start; {}: no site tells."""
    predictor, sites = run.study.task.sums()[name], tuple(sorted(run.sites))
    known = {**predictor.start(), **given}
    for turn in range(predictor.exchanges):
        stage = f"trivial/{name}/{turn}"
        spec = run.strategy.spec(run.study, stage)
        total = run.ask(Ask(sites, stage, {"known": known}, spec, counts=False), run.progress.round, 0)
        if not isinstance(total, Total):
            raise TypeError("a predictor by sums is summed")
        if not total.sites:  # none may let its sums go
            return {}
        known = dict(predictor.solve(total.sum("sums"), known))
    return known
