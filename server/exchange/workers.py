"""Forked worker processes: each runs a crew; tensors pass through shared memory."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from server.exchange import Handler
from server.exchange.pool import Chunk, Desk, Gone, Hand, Outcome, Pool
from server.exchange.shared import Maps, Slabs
from strategies.exact import Fold, Partial
from strategies.protocol import Spec, Tree, fill, strip

_ALIGN = 64


class Workers(Pool):
    """As many processes as asked for, forked here and now.

    Forking copies nothing: code, plan and data stand in memory once. It is safe while this process
    runs torch on one thread, which `runtime=local` does; GPUs need an exchange that starts afresh.
    """

    def __init__(self, sites: Callable[[str], Handler], count: int) -> None:
        self._sites = sites
        self._context = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        super().__init__(count)

    def _hire(self) -> Hand:
        ours, theirs = self._context.Pipe()
        self._pipes = [ours, *(pipe for pipe in self._pipes if not pipe.closed)]
        # a fork inherits our ends of all pipes: while one is open anywhere, no worker learns that we are gone
        process = self._context.Process(target=_work, args=(self._sites, theirs, self._pipes), daemon=True)
        process.start()
        theirs.close()
        return _Forked(process, ours)

    def _share(self, commons: Sequence[Tree]) -> list[_Slab]:
        return [_Slab.write(tree, self.slabs) for tree in commons]

    def _unshare(self, payloads: list[_Slab]) -> None:
        for slab in payloads:
            self.slabs.back(slab.path, slab.size)

    def _ready(self, hands: Sequence[Hand]) -> Sequence[Hand]:
        by = {hand.pipe: hand for hand in hands if isinstance(hand, _Forked)}
        return [by[pipe] for pipe in wait(list(by), timeout=1.0) if isinstance(pipe, Connection)]

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.close()
        super().close()


class _Forked:
    """A forked process and our end of its pipe."""

    def __init__(self, process: BaseProcess, pipe: Connection) -> None:
        self._process = process
        self.pipe = pipe

    def begin(self, fold: Fold, spec: Spec, payloads: list[_Slab], slab: str) -> None:
        self._send("begin", fold, spec, payloads, slab)

    def give(self, chunk: Chunk, last: bool) -> None:
        self._send("do", chunk)

    def take(self) -> Outcome:
        outcome: Outcome = self._receive()
        return outcome

    def finish(self) -> None:
        self._send("finish")

    def partial(self) -> tuple[Partial, bool]:
        folded: tuple[Partial, bool] = self._receive()
        return folded

    def end(self) -> None:
        self.pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _send(self, *message: object) -> None:
        try:
            self.pipe.send(message)
        except OSError:
            raise Gone from None

    def _receive(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            raise Gone from None


def _work(sites: Callable[[str], Handler], pipe: Connection, inherited: Sequence[Connection]) -> None:
    """A worker's life: begin an ask, do sites, finish, until the pipe closes."""
    for other in inherited:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the run, once
    desk = Desk(sites)
    while True:
        try:
            message: tuple[Any, ...] = pipe.recv()
        except (EOFError, ConnectionError):
            return
        match message:
            case ("begin", fold, spec, slabs, own):
                desk.begin(fold, spec, [slab.read(desk.maps) for slab in slabs], own)
            case ("do", chunk):
                pipe.send(desk.do(chunk))
            case ("finish",):
                partial, ring = desk.finish()
                pipe.send((partial, ring is not None))


@dataclass(frozen=True)
class _Slab:
    """A tree in shared memory: its scalars here, its tensors one after the other in a file."""

    path: str
    text: str
    layout: list[tuple[str, torch.dtype, tuple[int, ...], int]]
    size: int

    @classmethod
    def write(cls, tree: Tree, slabs: Slabs) -> _Slab:
        text, tensors = strip(tree)
        layout, at = [], 0
        for name, tensor in tensors.items():
            layout.append((name, tensor.dtype, tuple(tensor.shape), at))
            at += -(-tensor.nbytes // _ALIGN) * _ALIGN
        slab = cls(slabs.lend(at), text, layout, at)
        for name, view in slab._views(slabs.maps).items():
            view.copy_(tensors[name])
        return slab

    def _views(self, maps: Maps) -> dict[str, Tensor]:
        whole = maps.get(self.path, self.size, torch.uint8)
        views = {}
        for name, dtype, shape, at in self.layout:
            count = int(torch.Size(shape).numel())
            views[name] = whole[at : at + count * dtype.itemsize].view(dtype).reshape(shape)
        return views

    def read(self, maps: Maps) -> Tree:
        return fill(self.text, self._views(maps))
