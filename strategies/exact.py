"""How answers come together: `Sum` adds exactly, `Collect` keeps each one on disk.

A sum lives in an int64 fixed-point ring: every value, times its weight and 2^bits, is rounded to a
whole number *before* it is added, and whole numbers add the same in any order, grouping or process.
Rounding is by magic number: 1.5 * 2^52 plus a float64 below 2^51 holds the rounded integer in its low
bits, so one addition in float64 and one in int64 are all it takes. The magic's own bits pile up
with each addition and are taken off when the sum is read (modulo 2^64, as int64 counts).

What passes `Spec.check` cannot overflow: `ring_bits` leaves room for the largest weight and value.
"""

from __future__ import annotations

import math
import mmap
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from conf.exits import Exit, Stop
from conf.files import scratch_prefix
from strategies.protocol import Epoch, Failure, Spec, Update

_MAGIC = torch.tensor(1.5 * 2.0**52, dtype=torch.float64)
_MAGIC_BITS = 0x4338000000000000
_BLOCK = 2**16  # values: half a MiB of float64, which stays in the cache of one core
_WINDOW = 2**22  # bytes of another process' sum that are mapped at once
_ROWS = 2**20  # values of all answers together that a reduction holds at once
_AGE_UNIT = 256  # staleness factors are whole multiples of 1/256, so that weights stay exact

MAX_ADDS = 4096
"""Most answers that one sum has room for."""


def ring_bits(max_weight: int, max_value: float) -> int:
    """Binary places of the ring: as many as the largest weight and value leave room for, at most 32.

    Two limits: |weight * value| * 2^bits stays under 2^51 (the rounding), and `MAX_ADDS` of them under
    2^62 (the sum). The resolution is absolute: 2^-bits / total weight.

    Raises:
        Stop: (`CONFIG`) there is no room at all.
    """
    size = math.ceil(math.log2(max_weight)) + math.ceil(math.log2(max_value))
    bits = min(32, 51 - size, 62 - size - int(math.log2(MAX_ADDS)))
    if bits < 16:
        raise Stop(
            Exit.CONFIG,
            f"federation.max_weight {max_weight} times max_value {max_value:g} leaves {bits} binary places "
            "for a sum; need 16: lower one of them",
        )
    return bits


def _group(name: str) -> str:
    return name.partition("/")[0]


@dataclass
class Partial:
    """An unfinished fold: mergeable, in any order.

    Attributes:
        ring: int64, flat, still with the magic's bits. file: where it lies too, if another process wrote it:
            read from there, it takes no memory here. rows: of a `Collect`, where each answer lies.
    """

    ring: Tensor | None = None
    adds: int = 0
    weight: int = 0
    sites: dict[str, Epoch] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    rows: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    file: Path | None = None

    def blocks(self, ring: Tensor) -> Iterator[Tensor]:
        """The ring, in pieces that fit in a cache; of a file no more is mapped than a window."""
        if self.file is None:
            yield from torch.split(ring, _BLOCK)
            return
        size = ring.nbytes
        with self.file.open("r+b") as file:
            for start in range(0, size, _WINDOW):
                window = mmap.mmap(file.fileno(), min(_WINDOW, size - start), offset=start)
                yield from torch.split(torch.frombuffer(window, dtype=torch.int64), _BLOCK)

    def close(self) -> None:
        """Remove what a collection has spooled, where it will not be finished."""
        for path, _, _ in self.rows.values():
            Path(path).unlink(missing_ok=True)

    def _join(self, other: Partial) -> None:
        self.adds += other.adds
        self.weight += other.weight
        self.sites |= other.sites
        self.failures |= other.failures
        self.rows |= other.rows


@dataclass(frozen=True)
class Sum:
    """Exact weighted sums.

    Attributes:
        counted: groups of tensors in which every site counts the same, whatever its weight.
        age_power: an answer that is `age` rounds old counts (1 + age)^-age_power of its weight.
    """

    counted: frozenset[str] = frozenset()
    age_power: float = 0.0

    def start(self, spec: Spec, place: Callable[[int], Tensor] | None = None) -> Partial:
        """An empty sum; `place(n)` gives n int64 of any value (shared memory, say)."""
        # the first answer is written, not added: memory that nobody touches costs nothing
        made = place or (lambda n: torch.empty(n, dtype=torch.int64))
        return Partial(ring=made(spec.size))

    def add(
        self, partial: Partial, spec: Spec, site: str, epoch: Epoch, update: Update, age: int = 0
    ) -> None:
        """Add an answer that passed `spec.check`."""
        # nothing to add up has no limit: a plan may go to any number of sites
        if partial.ring is None or (partial.adds >= MAX_ADDS and spec.size):
            raise ValueError(f"a sum has room for {MAX_ADDS} answers")
        scale = 2.0 ** ring_bits(spec.max_weight, spec.max_value)
        # however old, an answer counts a little: a sum of nothing but weight 0 has no mean
        weight = update.weight * max(1, round(_AGE_UNIT * (1 + age) ** -self.age_power))
        scratch = torch.empty(min(_BLOCK, spec.size), dtype=torch.float64)
        at = 0
        for counted, values in self._runs(spec, update):
            alpha = scale if counted else scale * weight / _AGE_UNIT
            _lift(values, alpha, partial.ring[at : at + values.numel()], scratch, first=partial.adds == 0)
            at += values.numel()
        partial.adds += 1
        partial.weight += weight
        partial.sites[site] = epoch

    def _runs(self, spec: Spec, update: Update) -> Iterator[tuple[bool, Tensor]]:
        """The values in order, small tensors joined: a call costs more than a thousand values."""
        key, run, size = (False, torch.float32), list[Tensor](), 0
        for name in spec.tensors:
            values = update.tensors[name].reshape(-1)
            mine = _group(name) in self.counted, values.dtype
            if run and (mine != key or size + values.numel() > _BLOCK):
                yield key[0], torch.cat(run) if len(run) > 1 else run[0]
                run, size = [], 0
            key = mine
            run.append(values)
            size += values.numel()
        if run:
            yield key[0], torch.cat(run) if len(run) > 1 else run[0]

    def merge(self, into: Partial, other: Partial) -> None:
        """Add `other` to `into`; `other` is used up."""
        if into.ring is None or other.ring is None:
            raise ValueError("cannot merge a sum with a collection")
        if into.adds + other.adds > MAX_ADDS and into.ring.numel():
            raise ValueError(f"a sum has room for {MAX_ADDS} answers")
        if not into.adds:
            into.ring = other.ring
        elif other.adds and other.ring.numel():
            for mine, theirs in zip(torch.split(into.ring, _BLOCK), other.blocks(other.ring), strict=True):
                mine += theirs
        into._join(other)

    def finish(self, partial: Partial, spec: Spec) -> Total:
        """The total; `partial` is used up."""
        if partial.ring is None:
            raise ValueError("not a sum")
        if not partial.adds:
            partial.ring.zero_()
        bias = (partial.adds * _MAGIC_BITS) % 2**64
        return Total(
            spec,
            self,
            partial.ring,
            bias - 2**64 if bias >= 2**63 else bias,
            partial.weight / _AGE_UNIT,
            partial.sites,
            partial.failures,
        )


def _lift(values: Tensor, alpha: float, ring: Tensor, scratch: Tensor, *, first: bool) -> None:
    """ring += round(values * alpha) (+ the magic's bits), block by block; `first`: = instead of +=.

    float32 is copied to float64 first (`torch.mul` into float64 multiplies in float32); 24 bits of it
    times a weight below 2^29 are exact there, so fused or not, the one rounding is the magic's.
    """
    for part, place in zip(torch.split(values, _BLOCK), torch.split(ring, _BLOCK), strict=True):
        block = scratch[: part.numel()]
        block.copy_(part)
        torch.add(_MAGIC, block, alpha=alpha, out=block)
        whole = block.view(torch.int64)
        if first:
            place.copy_(whole)
        else:
            place += whole


@dataclass(frozen=True)
class Total:
    """A finished sum.

    Attributes:
        ring: int64, flat, above the true sum by `bias` in each place (modulo 2^64).
        weight: sum of the weights. sites: whose answers it holds, and of which epoch.
        failures: who did not answer, or was not accepted.
    """

    spec: Spec
    fold: Sum
    ring: Tensor
    bias: int
    weight: float
    sites: dict[str, Epoch]
    failures: dict[str, Failure]

    @property
    def count(self) -> int:
        return len(self.sites)

    def mean(self, group: str) -> Mapping[str, Tensor]:
        """The means of a group's tensors, each computed when it is asked for (memory of one tensor)."""
        by = self.count if group in self.fold.counted else self.weight
        return _Lazy(self, group, 1.0 / by)

    def sum(self, group: str) -> Mapping[str, Tensor]:
        """The weighted sums of a group's tensors."""
        return _Lazy(self, group, 1.0)


class _Lazy(Mapping[str, Tensor]):
    """Tensors of one group of a total, in the spec's shape and type."""

    def __init__(self, total: Total, group: str, factor: float) -> None:
        self._ring, self._bias = total.ring, total.bias
        spec = total.spec
        self._factor = factor / 2.0 ** ring_bits(spec.max_weight, spec.max_value)
        self._at: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        at = 0
        for name, (shape, dtype) in spec.tensors.items():
            if _group(name) == group:
                self._at[name.partition("/")[2]] = (at, shape, dtype)
            at += math.prod(shape)

    def __getitem__(self, name: str) -> Tensor:
        at, shape, dtype = self._at[name]
        size = math.prod(shape)
        out = torch.empty(size, dtype=dtype)
        whole = torch.empty(min(size, _BLOCK), dtype=torch.int64)
        exact = torch.empty(min(size, _BLOCK), dtype=torch.float64)
        for part, place in zip(
            torch.split(self._ring[at : at + size], _BLOCK), torch.split(out, _BLOCK), strict=True
        ):
            n = part.numel()
            torch.sub(part, self._bias, out=whole[:n])
            exact[:n].copy_(whole[:n]).mul_(self._factor)
            place.copy_(exact[:n])
        return out.reshape(shape)

    def __contains__(self, name: object) -> bool:
        return name in self._at  # a Mapping's own would compute the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._at)

    def __len__(self) -> int:
        return len(self._at)


@dataclass(frozen=True)
class Collect:
    """Every answer by itself, spooled to disk: for medians, and for tables of who scored what."""

    def start(self, spec: Spec, place: Callable[[int], Tensor] | None = None) -> Partial:
        """An empty collection."""
        return Partial()

    def add(
        self, partial: Partial, spec: Spec, site: str, epoch: Epoch, update: Update, age: int = 0
    ) -> None:
        """Write an answer that passed `spec.check` to a file of its own."""
        with tempfile.NamedTemporaryFile(prefix=scratch_prefix(), suffix=".row", delete=False) as file:
            # listed before it is written: a full disk leaves no file that nobody removes
            partial.rows[site] = (file.name, update.weight, age)
            for name in spec.tensors:
                file.write(update.tensors[name].detach().cpu().contiguous().numpy().tobytes())
        partial.adds += 1
        partial.weight += update.weight
        partial.sites[site] = epoch

    def merge(self, into: Partial, other: Partial) -> None:
        """Add `other` to `into`."""
        into._join(other)

    def finish(self, partial: Partial, spec: Spec) -> Collected:
        """The collection, in the order of the sites' names."""
        return Collected(spec, dict(sorted(partial.rows.items())), partial.sites, partial.failures)


@dataclass(frozen=True)
class Collected:
    """A finished collection. `close` (or leaving its `with`) removes the files."""

    spec: Spec
    rows: dict[str, tuple[str, int, int]]
    sites: dict[str, Epoch]
    failures: dict[str, Failure]

    def __enter__(self) -> Collected:
        return self

    def __exit__(self, *_: Any) -> Literal[False]:
        self.close()
        return False

    def close(self) -> None:
        """Remove the spooled answers."""
        for path, _, _ in self.rows.values():
            Path(path).unlink(missing_ok=True)

    @property
    def count(self) -> int:
        return len(self.sites)

    @property
    def weights(self) -> dict[str, int]:
        return {site: weight for site, (_, weight, _) in self.rows.items()}

    def answer(self, site: str) -> dict[str, Tensor]:
        """One site's tensors."""
        found = {}
        for name, (shape, _) in self.spec.tensors.items():
            tail = self.spec.tail if name == next(reversed(self.spec.tensors)) else 0
            values = self._read(site, name, 0, math.prod(shape) + tail)
            found[name] = values if tail else values.reshape(shape)
        return found

    def reduce(self, group: str, rule: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Apply `rule([sites, columns]) -> [columns]` to a group, block by block."""
        reduced = {}
        step = max(1, _ROWS // max(1, len(self.rows)))
        for name, (shape, dtype) in self.spec.tensors.items():
            if _group(name) != group:
                continue
            size = math.prod(shape)
            out = torch.empty(size, dtype=dtype)
            for start in range(0, size, step):
                stop = min(start + step, size)
                out[start:stop] = rule(
                    torch.stack([self._read(site, name, start, stop) for site in self.rows])
                )
            reduced[name.partition("/")[2]] = out.reshape(shape)
        return reduced

    def _read(self, site: str, name: str, start: int, stop: int) -> Tensor:
        """Values start to stop of one tensor of one answer."""
        offset = 0
        for other, (shape, dtype) in self.spec.tensors.items():
            if other == name:
                break
            offset += math.prod(shape) * dtype.itemsize
        dtype = self.spec.tensors[name][1]
        if stop == start:
            return torch.empty(0, dtype=dtype)
        path = Path(self.rows[site][0])
        stop = min(stop, (path.stat().st_size - offset) // dtype.itemsize)
        with path.open("rb") as file:
            file.seek(offset + start * dtype.itemsize)
            return torch.frombuffer(bytearray(file.read((stop - start) * dtype.itemsize)), dtype=dtype)


Fold = Sum | Collect
Folded = Total | Collected
