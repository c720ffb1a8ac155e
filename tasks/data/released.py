"""The files whose pixels the hospital's engineer has looked at, and found to show nobody."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from conf.exits import Exit, Stop
from conf.files import write_atomic

#: what a refusal says to do
REMEDY = "; when you have looked at it: wardround-site release FILE"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Released:
    """The files that the engineer released: SHA-256 of each, a line each, in a file of the site."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: frozenset[str] | None = None

    @property
    def known(self) -> frozenset[str]:
        """The digests.

        Raises:
            Stop: (`CONFIG`) a line is none.
        """
        if self._known is None:
            try:
                lines = self._path.read_text().split()
            except FileNotFoundError:
                lines = []
            if any(not _DIGEST.fullmatch(line) for line in lines):
                raise Stop(Exit.CONFIG, f"{self._path} holds a line that is no SHA-256; remove that line")
            self._known = frozenset(lines)
        return self._known

    def holds(self, path: Path) -> bool:
        """Whether this very file was released; not if it is gone meanwhile."""
        try:
            return bool(self.known) and digest(path) in self.known
        except OSError:
            return False

    def add(self, digests: Iterable[str]) -> int:
        """Release files by their digests; returns how many were not yet."""
        new = set(digests) - self.known
        if new:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(self._path, ("\n".join(sorted(self.known | new)) + "\n").encode())
            self._known = self.known | new
        return len(new)


def digest(path: Path) -> str:
    """SHA-256 of a file, by which it is released: a changed file needs a new look."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
