"""How much is read at one time: many small cases, or one that fills the memory by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_BYTES = 512 << 20
_PACKED = 4  # a gzipped volume grows about so much


class Room:
    """Lets readers in as long as their files together are smaller than `limit`; a larger one alone.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: int = _BYTES) -> None:
        self._limit, self._taken = limit, 0
        self._change = threading.Condition()

    @contextmanager
    def of(self, files: Iterable[Path]) -> Iterator[None]:
        """Wait for room for the files of a case."""
        size = sum(_size(path) for path in files)
        with self._change:
            self._change.wait_for(lambda: self._taken == 0 or self._taken + size <= self._limit)
            self._taken += size
        try:
            yield
        finally:
            with self._change:
                self._taken -= size
                self._change.notify_all()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size * (_PACKED if path.suffix == ".gz" else 1)
    except OSError:  # reading it says so
        return 0
