"""The exchange on one machine without Ray: in this process, or over forked workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from server.exchange import Handler, Heard
from server.exchange.crew import Crew
from server.exchange.pool import Item
from server.exchange.virtual import VirtualExchange
from server.exchange.workers import Workers
from strategies.exact import Fold, Partial
from strategies.protocol import Failure, Spec


class LocalExchange(VirtualExchange):
    """Sites in this process (`workers=1`) or in forked ones.

    Args:
        sites: makes the handler of a named site.
        blobs: where payloads of outstanding asynchronous jobs are kept.
        seed: the plan's seed, for the virtual clock.
    """

    def __init__(self, sites: Callable[[str], Handler], *, blobs: Path, seed: int, workers: int = 1) -> None:
        super().__init__(Workers(sites, workers) if workers > 1 else Here(sites), blobs=blobs, seed=seed)


class Here:
    """Jobs done in this process, one after the other."""

    def __init__(self, sites: Callable[[str], Handler]) -> None:
        self._crew: Crew | None = Crew(sites)

    def run(
        self, items: Sequence[Item], fold: Fold, spec: Spec, heard: Heard, limit: float
    ) -> Iterator[Partial]:
        if self._crew is None:
            raise ValueError("the exchange is closed")
        self._crew.start(fold, spec)
        for item in items:
            if time.monotonic() < limit:
                failure = self._crew.run(item.instruction, item.common, item.age)
            else:
                failure = self._crew.partial.failures[item.site] = Failure("deadline")
            heard(item.site, failure)
        yield self._crew.partial

    def close(self) -> None:
        self._crew = None
