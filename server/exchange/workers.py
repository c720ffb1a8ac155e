"""Forked worker processes: each runs a crew; tensors pass through shared memory."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from conf.files import scratch_prefix, shared_memory
from server.exchange import Handler, Heard
from server.exchange.crew import Crew
from strategies.exact import Fold, Partial
from strategies.protocol import Failure, Spec, Tree, fill, strip

if TYPE_CHECKING:
    from server.exchange.local import Item

_ALIGN = 64
_TARGET_S = 0.02  # a worker gets as many sites at once as take about this long


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    taken: list[Item] = field(default_factory=list)
    done: list[Item] = field(default_factory=list)


class Workers:
    """As many processes as asked for, forked here and now.

    Forking copies nothing: code, plan and data stand in memory once. It is safe while this process
    runs torch on one thread, which `runtime=local` does; GPUs need an exchange that starts afresh.
    """

    def __init__(self, sites: Callable[[str], Handler], count: int) -> None:
        self._sites = sites
        self._context = multiprocessing.get_context("fork")
        # its files are unlinked as soon as both ends have mapped them
        self._folder = tempfile.TemporaryDirectory(prefix=scratch_prefix(), dir=shared_memory())
        self._home: dict[str, int] = {}
        self._chunk = 1
        self._workers: list[_Worker] = []
        for _ in range(count):
            self._workers.append(self._fork())

    def _fork(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        # a fork inherits our ends of all pipes: while one is open anywhere, no worker learns that we are gone
        inherited = [ours, *(worker.pipe for worker in self._workers)]
        process = self._context.Process(
            target=_work, args=(self._sites, theirs, self._folder.name, inherited), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def run(
        self, items: Sequence[Item], fold: Fold, spec: Spec, heard: Heard, limit: float
    ) -> Iterator[Partial]:
        """Do the items; yields one partial for each worker that folded anything.

        A worker that dies takes its partial along: it is replaced, and the sites in that partial are asked
        once more; then they count as lost.
        """
        lost = list(items)
        for _ in range(2):
            if lost:
                lost = yield from self._pass(lost, fold, spec, heard, limit)
        if lost:
            yield self._failed([item.instruction.site for item in lost], "lost_site", fold, spec, heard)

    def _pass(
        self, items: Sequence[Item], fold: Fold, spec: Spec, heard: Heard, limit: float
    ) -> Generator[Partial, None, list[Item]]:
        """Deal the items out until all are done, then gather; returns what was lost with a worker."""
        commons = {id(item.common): item.common for item in items}
        slabs = {key: _Slab.write(tree, self._folder.name) for key, tree in commons.items()}
        begin = ("start", fold, spec, slabs)
        queue = deque(items)
        lost: list[Item] = []
        for index, worker in enumerate(self._workers):
            try:
                worker.pipe.send(begin)
                worker.done = []
            except OSError:  # it died between two asks
                self._replace(index).send(begin)
        while queue or any(worker.taken for worker in self._workers):
            if queue and time.monotonic() >= limit:
                late = [item.instruction.site for item in queue]
                queue.clear()
                yield self._failed(late, "deadline", fold, spec, heard)
            lost += self._deal(queue, begin, heard)
        for index, worker in enumerate(self._workers):
            partial = self._gather(worker, spec)
            if partial is None:
                lost += worker.done
                self._replace(index)
            else:
                yield partial
        for slab in slabs.values():
            Path(slab.path).unlink()
        return lost

    def _deal(self, queue: deque[Item], begin: tuple[object, ...], heard: Heard) -> list[Item]:
        """Give idle workers something, wait for a busy one; returns what was lost with a worker."""
        for index, worker in enumerate(self._workers):
            if queue and not worker.taken:
                self._give(index, worker, queue)
        wait([worker.pipe for worker in self._workers if worker.taken], timeout=1.0)
        lost: list[Item] = []
        for index, worker in enumerate(self._workers):
            if worker.taken and worker.pipe.poll() and not self._take(worker, heard):
                lost += worker.done + worker.taken
                self._replace(index).send(begin)
        return lost

    @staticmethod
    def _gather(worker: _Worker, spec: Spec) -> Partial | None:
        """What a worker folded; None when it died with it."""
        try:
            worker.pipe.send(("finish",))
            partial, path = worker.pipe.recv()
        except (EOFError, OSError):
            return None
        if path is not None:
            partial.ring = _map(path, spec.size, torch.int64)
            Path(path).unlink()
        folded: Partial = partial
        return folded

    @staticmethod
    def _failed(names: Sequence[str], code: str, fold: Fold, spec: Spec, heard: Heard) -> Partial:
        partial = fold.start(spec)
        for name in names:
            partial.failures[name] = Failure(code)
            heard(name, partial.failures[name])
        return partial

    def _give(self, index: int, worker: _Worker, queue: deque[Item]) -> None:
        """Hand a worker its next sites, by preference those it had before (their cases are prepared)."""
        own = [item for item in queue if self._home.setdefault(item.instruction.site, index) == index]
        # a fair share at most, so that no worker ends with a long chunk while the others wait
        size = min(self._chunk, max(1, len(queue) // len(self._workers)))
        worker.taken = (own or list(queue))[:size]
        for item in worker.taken:
            queue.remove(item)
            self._home[item.instruction.site] = index
        # to a dead worker nothing can be sent: `_take` finds out, and its sites go to another
        with contextlib.suppress(OSError):
            worker.pipe.send(
                ("run", [(item.instruction, id(item.common), item.age) for item in worker.taken])
            )

    def _take(self, worker: _Worker, heard: Heard) -> bool:
        """What a worker says of its chunk; False when it died before it could."""
        try:
            seconds, outcome = worker.pipe.recv()
        except (EOFError, OSError):
            return False
        for name, failure in outcome:
            heard(name, failure)
        if seconds < _TARGET_S / 2:
            self._chunk = min(2 * self._chunk, 1024)
        elif seconds > 2 * _TARGET_S:
            self._chunk = max(1, self._chunk // 2)
        worker.done += worker.taken
        worker.taken = []
        return True

    def _replace(self, index: int) -> Connection:
        """A new process in the place of a dead one."""
        dead = self._workers[index]
        dead.pipe.close()
        dead.process.join()
        self._workers[index] = self._fork()
        return self._workers[index].pipe

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._folder.cleanup()


def _work(
    sites: Callable[[str], Handler], pipe: Connection, folder: str, inherited: Sequence[Connection]
) -> None:
    """A worker's life: start an ask, run sites, finish, until the pipe closes."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the run, once
    crew = Crew(sites)
    commons: dict[int, Tree] = {}
    path: list[str] = []
    while True:
        try:
            message: tuple[Any, ...] = pipe.recv()
        except EOFError:
            return
        match message:
            case ("start", fold, spec, slabs):
                commons = {key: slab.read() for key, slab in slabs.items()}
                path.clear()
                crew.start(fold, spec, lambda n: _place(n, folder, path))
            case ("run", items):
                began = time.monotonic()
                outcome = [(i.site, crew.run(i, commons[key], age)) for i, key, age in items]
                pipe.send((time.monotonic() - began, outcome))
            case ("finish",):
                crew.partial.ring = None
                pipe.send((crew.partial, path[0] if path else None))


def _place(n: int, folder: str, path: list[str]) -> Tensor:
    """n zeroed int64 in a new shared file."""
    handle, name = tempfile.mkstemp(dir=folder)
    os.close(handle)
    path.append(name)
    return _map(name, n, torch.int64)


def _map(path: str, n: int, dtype: torch.dtype) -> Tensor:
    return torch.from_file(path, shared=True, size=n, dtype=dtype) if n else torch.zeros(0, dtype=dtype)


@dataclass(frozen=True)
class _Slab:
    """A tree in shared memory: its scalars here, its tensors one after the other in a file."""

    path: str
    text: str
    layout: list[tuple[str, torch.dtype, tuple[int, ...], int]]
    size: int

    @classmethod
    def write(cls, tree: Tree, folder: str) -> _Slab:
        text, tensors = strip(tree)
        layout, at = [], 0
        for name, tensor in tensors.items():
            layout.append((name, tensor.dtype, tuple(tensor.shape), at))
            at += -(-tensor.nbytes // _ALIGN) * _ALIGN
        handle, path = tempfile.mkstemp(dir=folder)
        os.close(handle)
        slab = cls(path, text, layout, at)
        for name, view in slab._views().items():
            view.copy_(tensors[name])
        return slab

    def _views(self) -> dict[str, Tensor]:
        whole = _map(self.path, self.size, torch.uint8)
        views = {}
        for name, dtype, shape, at in self.layout:
            count = int(torch.Size(shape).numel())
            views[name] = whole[at : at + count * dtype.itemsize].view(dtype).reshape(shape)
        return views

    def read(self) -> Tree:
        return fill(self.text, self._views())
