"""The exchange of a simulation: whoever carries the jobs, the clock is virtual.

Results do not depend on what carries them, nor on how many carry. Asynchronous asks (`Ask.need`) run on
a virtual clock: how long a site takes is drawn from the seed, so asynchrony repeats exactly.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from conf.files import sweep_scratch, write_atomic
from server.exchange import Heard, Order
from server.exchange.pool import Carrier, Item
from strategies.exact import Fold, Folded, Partial
from strategies.protocol import Instruction, Spec, Tree, pack, unpack
from tasks.seeds import generator


@dataclass(frozen=True)
class _Job:
    """An outstanding job of an asynchronous run; its payload is kept by digest."""

    instruction: Instruction
    common: str
    finish: float


class VirtualExchange:
    """Orders to jobs, on a virtual clock.

    Args:
        carrier: does the jobs.
        blobs: where payloads of outstanding asynchronous jobs are kept.
        seed: the plan's seed, for the clock.
    """

    def __init__(self, carrier: Carrier, *, blobs: Path, seed: int) -> None:
        sweep_scratch()
        self.carrier = carrier
        self._blobs = blobs
        self._seed = seed
        self._clock = 0.0
        self._jobs: dict[str, _Job] = {}

    def __call__(self, order: Order, heard: Heard) -> Folded:
        ask = order.ask
        total = ask.fold.start(ask.spec)
        total.failures |= order.known
        if ask.need is None:
            items = [Item(i, ask.down) for i in order.instructions.values()]
            self._run(items, ask.fold, ask.spec, total, heard, order.deadline_s)
        else:
            self._issue(order)
            while len(total.sites) < ask.need and self._jobs:
                batch = self._earliest(ask.need - len(total.sites), order.round)
                # a job that failed before an interruption takes its time again, but is not done again
                batch = [item for item in batch if item.instruction.site not in order.known]
                self._run(batch, ask.fold, ask.spec, total, heard, order.deadline_s)
        return ask.fold.finish(total, ask.spec)

    def _run(
        self, items: Sequence[Item], fold: Fold, spec: Spec, total: Partial, heard: Heard, deadline_s: float
    ) -> None:
        """Do the jobs and fold their answers into `total`; past the deadline the rest are failures."""
        limit = time.monotonic() + deadline_s if deadline_s else math.inf
        for partial in self.carrier.run(items, fold, spec, heard, limit):
            fold.merge(total, partial)

    # ---- asynchronous asks

    def _issue(self, order: Order) -> None:
        """Give every asked site its job, and the time it will take."""
        blob = pack(order.ask.down)
        digest = hashlib.sha256(blob).hexdigest()
        path = self._blobs / f"{digest}.safetensors"
        if order.instructions and not path.exists():
            self._blobs.mkdir(parents=True, exist_ok=True)
            write_atomic(path, blob)
        for name, instruction in order.instructions.items():
            draw = generator(self._seed, name, order.round, order.ask.stage, "duration")
            # log-normal with a spread of e^0.5: most sites are alike, a few are slow
            duration = math.exp(0.5 * float(torch.randn((), generator=draw, dtype=torch.float64)))
            self._jobs[name] = _Job(replace(instruction, common=digest), digest, self._clock + duration)

    def _earliest(self, count: int, now: int) -> list[Item]:
        """Take the jobs that finish first off the list; the clock moves to the last of them."""
        first = sorted(self._jobs.values(), key=lambda job: (job.finish, job.instruction.site))[:count]
        items = []
        for job in first:
            del self._jobs[job.instruction.site]
            self._clock = max(self._clock, job.finish)
            common = unpack((self._blobs / f"{job.common}.safetensors").read_bytes())
            items.append(Item(job.instruction, common, now - job.instruction.round))
        return items

    def busy(self) -> frozenset[str]:
        return frozenset(self._jobs)

    def snapshot(self) -> Tree:
        jobs = [
            # the run's id is left out: equal runs have equal checkpoints
            {
                "instruction": {**job.instruction.to_tree(), "run": ""},
                "common": job.common,
                "finish": job.finish,
            }
            for _, job in sorted(self._jobs.items())
        ]
        return {"clock": self._clock, "jobs": jobs}

    def restore(self, tree: Tree, run: str) -> None:
        self._clock = tree.get("clock", 0.0)
        self._jobs = {}
        for job in tree.get("jobs", []):
            asked = {**job["instruction"], "run": run}
            asked["settled"] = tuple(asked["settled"]) if asked["settled"] else None
            self._jobs[asked["site"]] = _Job(Instruction(**asked), job["common"], job["finish"])

    def close(self) -> None:
        self.carrier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
