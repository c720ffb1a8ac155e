"""The exchange over Ray actors, on this machine or a cluster: each runs a crew, as a forked worker does.

A payload goes into the object store once for an ask, and actors map it read-only; sites travel by name,
many in a call; what comes back is one partial for each actor.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from torch import Tensor

from conf.files import scratch_prefix, shared_memory
from conf.schema import Runtime
from server.exchange import Handler
from server.exchange.pool import Chunk, Desk, Gone, Hand, Outcome, Pool, mapped, place
from server.exchange.virtual import VirtualExchange
from strategies.exact import Fold, Partial
from strategies.protocol import Spec, Tree, fill, strip

Flat = tuple[str, dict[str, tuple[np.ndarray[Any, Any], torch.dtype, tuple[int, ...]]]]
"""A tree as Ray keeps it without copies: scalars as text, tensors as bytes with type and shape."""

_SMALL = 2**16  # bytes that travel with a call: Ray itself stores what is larger than 100 kB

Ring = str | np.ndarray[Any, Any] | None
"""A partial sum: its path in shared memory, or itself, from another machine."""


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
        # sums of actors on this machine; its files are unlinked as soon as both ends have mapped them
        self._folder = tempfile.TemporaryDirectory(prefix=scratch_prefix(), dir=shared_memory())
        super().__init__(count)

    def _hire(self) -> Hand:
        made = cast(Any, _Actor).options(num_cpus=1, num_gpus=self._gpus, max_restarts=0)
        return _Handle(made.remote(self._sites, self._node, self._folder.name))

    def _share(self, commons: Sequence[Tree]) -> list[Any]:
        return [_shared(_flat(tree)) for tree in commons]

    def _unshare(self, payloads: list[Any]) -> None:
        payloads.clear()  # the object store drops what nobody refers to

    def close(self) -> None:
        """End the actors."""
        super().close()
        self._folder.cleanup()

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
        self._size = 0

    @property
    def oldest(self) -> Any:
        """The oldest outstanding chunk."""
        return self._chunks[0]

    def begin(self, fold: Fold, spec: Spec, payloads: list[Any]) -> None:
        # goes with the first chunk: every call costs
        self._begin, self._payloads, self._chunks = (fold, spec), list(payloads), []
        self._finish = self._folded = None
        self._size = spec.size

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

    def partial(self) -> Partial:
        partial, ring = _get(self._finish) if self._folded is None else self._folded
        self._finish = self._folded = None
        if isinstance(ring, str):
            partial.ring, partial.file = mapped(ring, self._size, torch.int64), Path(ring)
        elif ring is not None:  # from another machine; sums are added to, the object store is read-only
            partial.ring = _tensor(ring, torch.int64, ring.shape).clone()
        folded: Partial = partial
        return folded

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

    def __init__(self, sites: Callable[[str], Handler], node: str, folder: str) -> None:
        torch.set_num_threads(1)
        self._desk = Desk(sites)
        self._near = node == ray.get_runtime_context().get_node_id()
        self._folder = folder
        self._path: list[str] = []

    def do(
        self, chunk: Chunk, last: bool, begin: tuple[Any, ...], *payloads: Flat
    ) -> tuple[Outcome, tuple[Partial, Ring] | None]:
        """Sites of the current ask. The first chunk brings the ask itself, the last takes its sum home."""
        if begin:
            self._desk.payloads = [_tree(flat) for flat in payloads]
            self._path.clear()
            fold, spec = begin
            shared = (lambda n: place(n, self._folder, self._path)) if self._near else None
            self._desk.crew.start(fold, spec, shared)
        return self._desk.do(chunk), self.finish() if last else None

    def finish(self) -> tuple[Partial, Ring]:
        """What the ask folded to: the ring apart, by its path in shared memory or as an array."""
        self._desk.payloads = ()
        partial = self._desk.crew.partial
        ring, partial.ring = partial.ring, None
        if ring is None or self._path:
            return partial, self._path[0] if ring is not None else None
        return partial, ring.numpy()


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
