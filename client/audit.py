"""`audit.jsonl`: a record of every request, decision and release that nobody can shorten or rewrite unseen.

Each line holds the SHA-256 of the line before it, and `audit.head` beside the log holds number, digest and
end of the last one. A line is durable before the head is, and both before `add` returns. So a crash leaves
a torn line, which is cut away, or one line more than the head knows, which is taken in; whatever else is
missing or different was done by somebody, and is said.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from conf.exits import Exit, Stop
from conf.files import no_space, sync_folder, write_atomic

Scalar = str | int | float | bool | None
_START = "0" * 64


@dataclass(frozen=True)
class Head:
    """Where the log ends: lines, digest of the last, bytes."""

    lines: int = 0
    digest: str = _START
    size: int = 0


class Audit:
    """The log of one site. Several processes may add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._head = path.with_suffix(".head")

    def add(self, event: str, **facts: Scalar) -> Head:
        """Write an event down, durably, before what it allows is done.

        Args:
            event: a word (`init`, `forget`, `request`, …). facts: what is needed to judge it later.

        Returns:
            The new head: noted elsewhere, it proves that nothing before it was changed.

        Raises:
            Stop: (`AUDIT_BROKEN`) the log is not what was written; (`DISK_FULL`).
        """
        with no_space(self.path, "repeat"), self._open() as file:
            head = self._mend(file)
            line = _line(
                {"n": head.lines + 1, "time": _now(), "event": event, **facts, "before": head.digest}
            )
            file.seek(head.size)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
            return self._note(_after(head, line))

    def verify(self) -> Head:
        """Check every line.

        Raises:
            Stop: (`AUDIT_BROKEN`) a line was changed, taken out, put in, moved or cut off.
        """
        for _ in self.events():
            pass
        return self._known()

    def events(self) -> Iterator[dict[str, Any]]:
        """Every event, each checked against the one before it.

        Raises:
            Stop: (`AUDIT_BROKEN`) as `verify`.
        """
        with self._open() as file:
            self._mend(file)
            known, head = self._known(), Head()
            file.seek(0)
            for line in file:
                yield self._checked(line, head)
                head = _after(head, line)
            if head != known:
                raise self._broken(f"it ends at line {head.lines}, {self._head.name} says {known.lines}")

    @contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = not self.path.exists()
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(handle, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if new:
                sync_folder(self.path.parent)
            yield file

    def _mend(self, file: BinaryIO) -> Head:
        """The end of the log, after a crash set right."""
        head = self._known()
        if (size := os.fstat(file.fileno()).st_size) < head.size:
            raise self._broken(f"it has {size} of {head.size} bytes")
        file.seek(head.size)
        rest = file.read()
        whole, torn = rest[: rest.rfind(b"\n") + 1], len(rest) - rest.rfind(b"\n") - 1
        if whole.count(b"\n") > 1:
            raise self._broken(f"more than one line follows line {head.lines}, the last that was written")
        if torn:
            file.truncate(head.size + len(whole))
            os.fsync(file.fileno())
        if whole:
            self._checked(whole, head)
            head = self._note(_after(head, whole))
        return head

    def _known(self) -> Head:
        try:
            return Head(**json.loads(self._head.read_bytes()))
        except FileNotFoundError:
            return Head()
        except (ValueError, TypeError) as error:
            raise self._broken(f"{self._head.name} is unreadable ({type(error).__name__})") from None

    def _note(self, head: Head) -> Head:
        write_atomic(self._head, json.dumps(head.__dict__).encode(), mode=0o600)
        return head

    def _checked(self, line: bytes, head: Head) -> dict[str, Any]:
        try:
            event: dict[str, Any] = json.loads(line)
            right = event["n"] == head.lines + 1 and event["before"] == head.digest and line == _line(event)
        except (ValueError, KeyError, TypeError):
            right = False
        if not right:
            raise self._broken(f"line {head.lines + 1} is not what was written there")
        return event

    def _broken(self, why: str) -> Stop:
        return Stop(Exit.AUDIT_BROKEN, f"audit log {self.path}: {why}; keep it, and find out who changed it")


def _after(head: Head, line: bytes) -> Head:
    return Head(head.lines + 1, hashlib.sha256(line).hexdigest(), head.size + len(line))


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
