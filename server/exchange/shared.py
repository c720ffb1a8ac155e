"""Memory that processes of one machine share: files in memory, mapped by both ends, used again.

Fresh pages cost: the kernel clears each of them at its first use, and a new mapping faults at each page
that is written. For a sum of 25 M values that takes as long as adding an answer to it; so files and mappings
are kept.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from conf.files import scratch_prefix, shared_memory


class Slabs:
    """Files of given sizes; whoever has done with one brings it back."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix=scratch_prefix(), dir=shared_memory())
        self._free: dict[int, list[str]] = {}
        self.maps = Maps()

    @property
    def folder(self) -> str:
        """Where they lie."""
        return self._folder.name

    def lend(self, size: int, before: str = "") -> str:
        """A file of `size` bytes and any content, if it can be the one that was lent `before`."""
        free = self._free.get(size)
        if free:
            return free.pop(free.index(before) if before in free else -1)
        handle, path = tempfile.mkstemp(dir=self.folder)
        os.close(handle)
        return path

    def back(self, path: str, size: int) -> None:
        """`path`, lent as one of `size` bytes, is used by nobody any more."""
        self._free.setdefault(size, []).append(path)

    def lost(self, path: str) -> None:
        """Whoever had `path` died, and may not be quite dead: nobody gets it again."""
        self.maps.forget(path)
        Path(path).unlink(missing_ok=True)

    def summed(self, path: str, n: int) -> Tensor:
        """The n int64 that another process wrote to `path`, which comes back when the tensor is garbage."""
        ring = self.maps.get(path, n, torch.int64).view(-1)
        weakref.finalize(ring, self.back, path, ring.nbytes).atexit = False
        return ring

    def close(self) -> None:
        """Remove them all."""
        self._folder.cleanup()


class Maps:
    """A process' own mappings of shared files."""

    def __init__(self) -> None:
        self._known: dict[str, Tensor] = {}

    def get(self, path: str, n: int, dtype: torch.dtype) -> Tensor:
        """A file as a tensor of n values; a new file grows to that."""
        if not n:
            return torch.zeros(0, dtype=dtype)
        whole = self._known.get(path)
        if whole is None or whole.nbytes != n * dtype.itemsize:
            whole = torch.from_file(path, shared=True, size=n * dtype.itemsize, dtype=torch.uint8)
            self._known[path] = whole
        return whole.view(dtype)

    def forget(self, path: str) -> None:
        """Its mapping may go."""
        self._known.pop(path, None)
