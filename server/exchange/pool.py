"""Dealing an ask's sites out to worker processes, and what happens when one of them dies.

How a worker is reached (a pipe to a forked process, a call to a Ray actor) is left to its `Hand`;
dealing, order, retries and deadlines are the same for all.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from server.exchange import Handler, Heard
from server.exchange.crew import Crew
from server.exchange.shared import Maps, Slabs
from strategies.exact import Fold, Partial
from strategies.protocol import Failure, Instruction, Spec, Tree

_TARGET_S = 0.02  # a worker gets as many sites at once as take about this long, at least
_SHARE = 0.75  # of what is left for each worker, as its next chunk: few calls, and an even end
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEW = 0.3  # how much of a new measurement enters what is known of a site's time


@dataclass(frozen=True)
class Item:
    """One site's job: the instruction, its shared payload, how many rounds old it is."""

    instruction: Instruction
    common: Tree
    age: int = 0

    @property
    def site(self) -> str:
        return self.instruction.site


Outcome = list[tuple[str, float, Failure | None]]
"""Of each site of a chunk: its name, the seconds it took, why its answer does not count."""
Chunk = list[tuple[Instruction, int, int]]
"""Instruction, number of the payload, age."""


class Gone(Exception):
    """A worker has ended, and what it had folded with it."""


class Carrier(Protocol):
    """Does jobs: in this process, or in others."""

    def run(
        self, items: Sequence[Item], fold: Fold, spec: Spec, heard: Heard, limit: float
    ) -> Iterator[Partial]:
        """Do the items until `limit` (monotonic seconds); yields what they fold to, in parts."""

    def close(self) -> None:
        """End what was started."""


class Hand(Protocol):
    """One worker process, as the pool speaks to it. Every method may raise `Gone`."""

    def begin(self, fold: Fold, spec: Spec, payloads: Any, slab: str) -> None:
        """Start an ask, its sum in the shared file `slab` (on this machine)."""

    def give(self, chunk: Chunk, last: bool) -> None:
        """Hand over some sites; `last`: there will be no more of this ask."""

    def take(self) -> Outcome:
        """What became of the oldest chunk that was given (waits for it)."""

    def finish(self) -> None:
        """No more sites, if `give` has not said so: `partial` will be asked for next."""

    def partial(self) -> tuple[Partial, bool]:
        """What the ask folded to (waits for it), and whether its ring is in the slab."""

    def end(self) -> None:
        """End the process; safe to call on a dead one."""


@dataclass
class _Worker:
    hand: Hand
    slab: str = ""  # lent for the current ask
    before: str = ""  # the one it had last: mapped there already
    served: bool = False
    taken: list[Item] = field(default_factory=list)
    done: list[Item] = field(default_factory=list)


class Pool(ABC):
    """Worker processes that live for the run and keep what they have prepared."""

    def __init__(self, count: int) -> None:
        self.slabs = Slabs()
        self._home: dict[str, int] = {}
        self._seconds: dict[str, dict[str, float]] = {}  # by stage and site
        self._workers: list[_Worker] = []
        for _ in range(count):
            self._workers.append(_Worker(self._hire()))

    @abstractmethod
    def _hire(self) -> Hand:
        """A new worker."""

    @abstractmethod
    def _share(self, commons: Sequence[Tree]) -> Any:
        """Put payloads where workers see them; what is returned goes to `Hand.begin`."""

    @abstractmethod
    def _unshare(self, payloads: Any) -> None:
        """Take them away again."""

    @abstractmethod
    def _ready(self, hands: Sequence[Hand]) -> Sequence[Hand]:
        """Those of the hands that have something to say (waits for one, a second at most)."""

    def run(
        self, items: Sequence[Item], fold: Fold, spec: Spec, heard: Heard, limit: float
    ) -> Iterator[Partial]:
        """Do the items; yields one partial for each worker that folded anything.

        A worker that dies takes its partial along: it is replaced, and the sites in that partial are asked
        once more; then they count as lost.
        """
        if not items:
            return
        keys: dict[int, int] = {}
        for item in items:
            keys.setdefault(id(item.common), len(keys))
        commons = {keys[id(item.common)]: item.common for item in items}
        payloads = self._share([commons[key] for key in range(len(commons))])
        try:
            lost = list(items)
            for _ in range(2):
                if lost:
                    lost = yield from self._pass(lost, fold, spec, heard, limit, (payloads, keys))
        finally:
            self._unshare(payloads)
        if lost:
            yield _failed([item.site for item in lost], "lost_site", fold, spec, heard)

    def _pass(
        self,
        items: Sequence[Item],
        fold: Fold,
        spec: Spec,
        heard: Heard,
        limit: float,
        shared: tuple[Any, Mapping[int, int]],
    ) -> Generator[Partial, None, list[Item]]:
        """Deal the items out until all are done, then gather; returns what was lost with a worker."""
        payloads, keys = shared
        # the longest first, so that no worker starts one when the others have finished
        queue = deque(sorted(items, key=self._expected, reverse=True))
        lost: list[Item] = []
        begun: set[int] = set()
        fair = -(-len(items) // len(self._workers))  # of sites that cost nothing each worker gets one chunk
        while queue or any(worker.taken for worker in self._workers):
            if queue and time.monotonic() >= limit:
                late = [item.site for item in queue]
                queue.clear()
                yield _failed(late, "deadline", fold, spec, heard)
            for index, worker in enumerate(self._workers):
                if queue and not worker.taken and not (index in begun and worker.served):
                    self._give(
                        index, queue, fair, keys, (fold, spec, payloads) if index not in begun else None
                    )
                    begun.add(index)
            lost += self._hear(heard, begun)
        for index in sorted(begun):
            self._try(index, lambda hand: hand.finish())
        for index in sorted(begun):
            worker = self._workers[index]
            try:
                partial, in_slab = worker.hand.partial()
            except Gone:
                lost += worker.done
                self._replace(index)
                continue
            worker.before, worker.slab = worker.slab, ""
            if in_slab:
                partial.ring, partial.file = self.slabs.summed(worker.before, spec.size), Path(worker.before)
            else:
                self.slabs.back(worker.before, 8 * spec.size)
            yield partial
            del partial  # and with it the slab, before another is needed
        return lost

    def _hear(self, heard: Heard, begun: set[int]) -> list[Item]:
        """Wait for a worker and hear it; returns what was lost with one."""
        busy = {id(worker.hand): index for index, worker in enumerate(self._workers) if worker.taken}
        lost: list[Item] = []
        for hand in self._ready([self._workers[index].hand for index in busy.values()]):
            index = busy[id(hand)]
            worker = self._workers[index]
            try:
                outcome = hand.take()
            except Gone:
                lost += worker.done + worker.taken
                self._replace(index)
                begun.discard(index)
                continue
            times = self._seconds.setdefault(worker.taken[0].instruction.stage, {})
            for name, seconds, failure in outcome:
                known = times.get(name, seconds)
                times[name] = known + _NEW * (seconds - known)
                heard(name, failure)
            worker.done += worker.taken
            worker.taken = []
        return lost

    def _give(
        self,
        index: int,
        queue: deque[Item],
        fair: int,
        keys: Mapping[int, int],
        begin: tuple[Fold, Spec, Any] | None,
    ) -> None:
        """Hand a worker its next sites, by preference those it had before (their cases are prepared)."""
        worker = self._workers[index]
        # a stable sort: own sites first, both in the order of the queue
        first = sorted(queue, key=lambda item: self._home.setdefault(item.site, index) != index)
        worker.taken = self._chunk(first, fair)
        chosen = {item.site for item in worker.taken}
        kept = [item for item in queue if item.site not in chosen]
        queue.clear()
        queue.extend(kept)
        self._home.update(dict.fromkeys(chosen, index))
        if begin is not None and not self._begin(index, *begin):
            # to a dead worker nothing can be said: a replacement may, and if not, `take` finds out
            taken = worker.taken
            self._replace(index)
            worker = self._workers[index]
            worker.taken = taken
            self._begin(index, *begin)
        chunk = [(item.instruction, keys[id(item.common)], item.age) for item in worker.taken]
        # its whole share at once, or all that was left: no second call needed to say that it was the last
        worker.served = len(chunk) >= fair or not queue
        self._try(index, lambda hand: hand.give(chunk, worker.served))

    def _begin(self, index: int, fold: Fold, spec: Spec, payloads: Any) -> bool:
        worker = self._workers[index]
        worker.done = []
        worker.slab = self.slabs.lend(8 * spec.size, worker.before)
        return self._try(index, lambda hand: hand.begin(fold, spec, payloads, worker.slab))

    def _chunk(self, items: Sequence[Item], fair: int) -> list[Item]:
        """As many as fill the target time, or most of a worker's share of what is left; `fair` at most."""
        seconds = [self._expected(item) for item in items]
        target = max(_TARGET_S, _SHARE * sum(seconds) / len(self._workers))
        ends = accumulate(seconds)
        count = sum(end <= target for end in islice(ends, fair))
        return list(items[: max(1, count)])

    def _expected(self, item: Item) -> float:
        """Seconds that a site takes: as before; as one heard lately; or long."""
        times = self._seconds.get(item.instruction.stage)
        if not times:
            return _TARGET_S
        return times.get(item.site) or next(reversed(times.values()))

    def _try(self, index: int, say: Callable[[Hand], None]) -> bool:
        try:
            say(self._workers[index].hand)
        except Gone:
            return False
        return True

    def _replace(self, index: int) -> None:
        """A new process in the place of a dead one."""
        worker = self._workers[index]
        worker.hand.end()
        if worker.slab:
            self.slabs.lost(worker.slab)
        self._workers[index] = _Worker(self._hire())

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.hand.end()
        self._workers = []
        self.slabs.close()


class Desk:
    """The worker's end: a crew, and the payloads of the current ask."""

    def __init__(self, sites: Callable[[str], Handler]) -> None:
        recycle()
        gc.freeze()  # what is imported stays: no need to look through it again, nor to copy it after a fork
        self.crew = Crew(sites)
        self.payloads: Sequence[Tree] = ()
        self.maps = Maps()

    def begin(self, fold: Fold, spec: Spec, payloads: Sequence[Tree], slab: str | None) -> None:
        """Start an ask, its sum in a shared file or, without one, in this process."""
        self.payloads = payloads
        place = None if slab is None else lambda n: self.maps.get(slab, n, torch.int64)
        self.crew.start(fold, spec, place)

    def do(self, chunk: Chunk) -> Outcome:
        """Ask each site of a chunk and fold its answer."""
        outcome: Outcome = []
        for instruction, key, age in chunk:
            began = time.monotonic()
            failure = self.crew.run(instruction, self.payloads[key], age)
            outcome.append((instruction.site, time.monotonic() - began, failure))
        return outcome

    def finish(self) -> tuple[Partial, Tensor | None]:
        """What the ask folded to, and its ring apart."""
        self.payloads = ()
        partial = self.crew.partial
        ring, partial.ring = partial.ring, None
        return partial, ring


def recycle() -> None:
    """Have this process keep freed memory for itself, where the C library is glibc.

    Every round frees and allocates tensors of the same sizes. Given back to the system, large ones come
    again page by page, each cleared by the kernel: of 100 MB that is more work than the sum made of it.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _failed(names: Sequence[str], code: str, fold: Fold, spec: Spec, heard: Heard) -> Partial:
    partial = fold.start(spec)
    for name in names:
        partial.failures[name] = Failure(code)
        heard(name, partial.failures[name])
    return partial
