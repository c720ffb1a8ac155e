"""The cases of each run at a hospital, frozen at its first look: an ingest never changes them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from client.train import Archive
from tasks.data.cache import Cache, Entry
from tasks.data.frozen import freeze, manifest

Split = Callable[[Sequence[Entry]], Mapping[str, Sequence[Entry]]]


class Shelf:
    """Archives by run. A forgotten patient leaves a run that is under way; nobody joins it."""

    def __init__(self, cache: Cache, split: Split) -> None:
        self._cache, self._split = cache, split
        self._known: dict[str, tuple[tuple[int, int], Archive]] = {}

    def of(self, run: str) -> Archive:
        """The cases of a run; the same after a restart.

        Args:
            run: its id, checked: it becomes a file's name.

        Raises:
            Stop: (`CACHE_DAMAGED`, `ONE_PATIENT`, …) no usable split.
        """
        path = manifest(self._cache, run)
        if run in self._known and path.exists() and _which(path) == self._known[run][0]:
            os.utime(path)  # the run lives
            return self._known[run][1]
        freeze(self._cache, run)
        which = _which(path)  # before it is read: what changes meanwhile is seen at the next look
        self._known[run] = which, Archive(self._split(freeze(self._cache, run)), self._cache.load)
        return self._known[run][1]


def _which(path: Path) -> tuple[int, int]:
    """Which file stands there: each change is another one, put in place by a rename, and shorter."""
    state = path.stat()
    return state.st_ino, state.st_size
