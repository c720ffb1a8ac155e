"""The exchange over Ray actors, on this machine or a cluster: each runs a crew, as a forked worker does.

A payload goes into the object store once for an ask, and actors map it read-only; sites travel by name,
many in a call; what comes back is one partial for each actor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from torch import Tensor

from conf.schema import Runtime
from server.exchange import Handler
from server.exchange.pool import Chunk, Desk, Gone, Hand, Outcome, Pool
from server.exchange.virtual import VirtualExchange
from strategies.exact import Fold, Partial
from strategies.protocol import Spec, Tree, fill, strip

Flat = tuple[str, dict[str, tuple[np.ndarray[Any, Any], torch.dtype, tuple[int, ...]]]]
"""A tree as Ray keeps it without copies: scalars as text, tensors as bytes with type and shape."""

_SMALL = 2**16  # bytes that travel with a call: Ray itself stores what is larger than 100 kB

Ring = bool | np.ndarray[Any, Any]
"""A partial sum: itself, from another machine; True, it is in the slab; False, there is none."""


class RayExchange(VirtualExchange):
    """Sites in Ray actors, one thread each, that live for the run.

    Args:
        sites: makes the handler of a named site, in the actor: what it holds is sent there once, so it
            is an instance of a class that can be imported there, not a closure.
        blobs: where payloads of outstanding asynchronous jobs are kept.
        seed: the plan's seed, for the virtual clock.
        workers: actors. gpus: what each takes, parts allowed.
    """

    def __init__(
        self, sites: Callable[[str], Handler], workers: int, gpus: float = 0.0, *, blobs: Path, seed: int
    ) -> None:
        super().__init__(Actors(sites, workers, gpus), blobs=blobs, seed=seed)


def room(runtime: Runtime) -> int:
    """How many actors the cluster has room for."""
    has = ray.cluster_resources()  # type: ignore[no-untyped-call]
    count = runtime.workers or int(has.get("CPU", 1))
    if runtime.gpus_per_site:
        count = min(count, int(has.get("GPU", 0) / runtime.gpus_per_site))
    return max(1, count)


class Actors(Pool):
    """As many actors as asked for."""

    def __init__(self, sites: Callable[[str], Handler], count: int, gpus: float) -> None:
        self._sites = ray.put(sites)
        self._gpus = gpus
        self._node = ray.get_runtime_context().get_node_id()
        super().__init__(count)

    def _hire(self) -> Hand:
        made = cast(Any, _Actor).options(num_cpus=1, num_gpus=self._gpus, max_restarts=0)
        return _Handle(made.remote(self._sites, self._node))

    def _share(self, commons: Sequence[Tree]) -> list[Any]:
        return [_shared(_flat(tree)) for tree in commons]

    def _unshare(self, payloads: list[Any]) -> None:
        payloads.clear()  # the object store drops what nobody refers to

    def _ready(self, hands: Sequence[Hand]) -> Sequence[Hand]:
        by = {hand.oldest: hand for hand in hands if isinstance(hand, _Handle)}
        done, _ = ray.wait(list(by), num_returns=1, timeout=1.0)
        if len(by) > 1 and done:
            done, _ = ray.wait(list(by), num_returns=len(by), timeout=0)
        return [by[ref] for ref in done]


class _Handle:
    """An actor, and the calls it has not answered."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._chunks: list[Any] = []
        self._begin: tuple[Any, ...] = ()
        self._payloads: list[Any] = []
        self._finish: Any = None
        self._folded: Any = None

    @property
    def oldest(self) -> Any:
        """The oldest outstanding chunk."""
        return self._chunks[0]

    def begin(self, fold: Fold, spec: Spec, payloads: list[Any], slab: str) -> None:
        # goes with the first chunk: every call costs
        self._begin, self._payloads, self._chunks = (fold, spec, slab), list(payloads), []
        self._finish = self._folded = None

    def give(self, chunk: Chunk, last: bool) -> None:
        self._chunks.append(self._actor.do.remote(chunk, last, self._begin, *self._payloads))
        self._begin, self._payloads = (), []

    def take(self) -> Outcome:
        outcome: Outcome
        outcome, self._folded = _get(self._chunks.pop(0))
        return outcome

    def finish(self) -> None:
        if self._folded is None:
            self._finish = self._actor.finish.remote()

    def partial(self) -> tuple[Partial, bool]:
        partial: Partial
        ring: Ring
        partial, ring = _get(self._finish) if self._folded is None else self._folded
        self._finish = self._folded = None
        if isinstance(ring, bool):
            return partial, ring
        # sums are added to, the object store is read-only
        partial.ring = _tensor(ring, torch.int64, ring.shape).clone()
        return partial, False

    def end(self) -> None:
        ray.kill(self._actor)


def _get(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError:
        raise
    except (RayActorError, WorkerCrashedError):
        raise Gone from None


@ray.remote
class _Actor:
    """A worker's end."""

    def __init__(self, sites: Callable[[str], Handler], node: str) -> None:
        torch.set_num_threads(1)
        self._desk = Desk(sites)
        self._near = node == ray.get_runtime_context().get_node_id()

    def do(
        self, chunk: Chunk, last: bool, begin: tuple[Any, ...], *payloads: Flat
    ) -> tuple[Outcome, tuple[Partial, Ring] | None]:
        """Sites of the current ask. The first chunk brings the ask itself, the last takes its sum home."""
        if begin:
            fold, spec, slab = begin
            self._desk.begin(fold, spec, [_tree(flat) for flat in payloads], slab if self._near else None)
        return self._desk.do(chunk), self.finish() if last else None

    def finish(self) -> tuple[Partial, Ring]:
        """What the ask folded to."""
        partial, ring = self._desk.finish()
        return partial, ring.numpy() if ring is not None and not self._near else ring is not None


def _shared(flat: Flat) -> Any:
    """A tree in the object store, or as it is, where that costs more than the tree."""
    size = sum(array.nbytes for array, _, _ in flat[1].values())
    return flat if size < _SMALL else ray.put(flat)


def _flat(tree: Tree) -> Flat:
    text, tensors = strip(tree)
    return text, {
        # as bytes: numpy has no bfloat16
        name: (t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), t.dtype, tuple(t.shape))
        for name, t in tensors.items()
    }


def _tree(flat: Flat) -> Tree:
    text, arrays = flat
    return fill(text, {name: _tensor(*given) for name, given in arrays.items()})


def _tensor(array: np.ndarray[Any, Any], dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A view of an array in the object store. It must not be written to, and nothing here does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        whole = torch.from_numpy(array)
    return whole.view(dtype).reshape(tuple(shape))
