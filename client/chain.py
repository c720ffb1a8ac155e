"""A log that is only added to, and that nobody can shorten or rewrite unseen.

Each line is canonical JSON and holds the SHA-256 of the line before it; a `.head` beside the log holds
number, digest and end of the last one. A line is durable before the head is, and both before `add` returns.
So a crash leaves a torn line, which is cut away, or one line more than the head knows, which is taken in;
whatever else is missing or different was done by somebody, and is said.
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
Record = dict[str, Any]
_START = "0" * 64


@dataclass(frozen=True)
class Head:
    """Where a log ends: lines, digest of the last, bytes."""

    lines: int = 0
    digest: str = _START
    size: int = 0


class Chain:
    """One such log. Several processes may add to it: whoever has it `open` is alone with it.

    Args:
        name: what messages call it. broken: how a command ends that finds it changed, and what to do then.
    """

    def __init__(self, path: Path, name: str, broken: Exit, remedy: str) -> None:
        self.path = path
        self._name, self._exit, self._remedy = name, broken, remedy

    @property
    def head_path(self) -> Path:
        """The file that knows where the log ends."""
        return self.path.with_suffix(".head")

    @contextmanager
    def open(self) -> Iterator[Grip]:
        """The log, locked, and after a crash set right.

        Raises:
            Stop: (`broken`) it is not what was written; (`DISK_FULL`).
        """
        with no_space(self.path, "repeat"):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked() as file:
                yield Grip(self, file)

    def _locked(self) -> BinaryIO:
        while True:
            new = not self.path.exists()
            file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
            fcntl.flock(file, fcntl.LOCK_EX)
            # while this one waited, the log may have been replaced: what is written to the old one is lost
            if self.path.exists() and os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                if new:
                    sync_folder(self.path.parent)
                return file
            file.close()

    def verify(self) -> Head:
        """Check every line.

        Raises:
            Stop: (`broken`) a line was changed, taken out, put in, moved or cut off.
        """
        with self.open() as grip:
            for _ in grip.since(Head()):
                pass
            return grip.head

    def records(self) -> list[Record]:
        """Every record, each checked against the one before it.

        Raises:
            Stop: (`broken`) as `verify`.
        """
        with self.open() as grip:  # not longer: somebody who reads slowly would stop the site
            return [record for record, _ in grip.since(Head())]

    def noted(self) -> Head:
        """The end as the head's file knows it."""
        try:
            head = Head(**json.loads(self.head_path.read_bytes()))
            if min(int(head.lines), int(head.size)) < 0 or len(bytes.fromhex(head.digest)) != 32:
                raise ValueError(head)
            return head
        except FileNotFoundError:
            return Head()
        except (ValueError, TypeError) as error:
            raise self.changed(f"{self.head_path.name} is unreadable ({type(error).__name__})") from None

    def replace(self, content: bytes, head: Head) -> None:
        """Put other lines, which end in `head`, in the place of what is there. The caller holds `aside`."""
        write_atomic(self.path, content, mode=0o600)
        write_atomic(self.head_path, json.dumps(head.__dict__).encode(), mode=0o600)

    @contextmanager
    def aside(self) -> Iterator[bytes]:
        """What the log's file holds, damaged or not, while nobody else can add to it."""
        with no_space(self.path, "repeat"):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked() as file:
                yield file.read()

    def changed(self, why: str) -> Stop:
        """The error for a log that somebody changed."""
        return Stop(self._exit, f"{self._name} {self.path}: {why}; {self._remedy}")


class Grip:
    """A log that this process alone holds."""

    def __init__(self, chain: Chain, file: BinaryIO) -> None:
        self._chain, self._file = chain, file
        self.head = self._mend()

    def add(self, **facts: Scalar) -> Head:
        """Write a record down, durably.

        Returns:
            The new head: noted elsewhere, it proves that nothing before it was changed.
        """
        line = line_of({"n": self.head.lines + 1, "time": _now(), **facts, "before": self.head.digest})
        self._file.seek(self.head.size)
        self._file.write(line)
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._note(_after(self.head, line))

    def since(self, head: Head) -> Iterator[tuple[Record, Head]]:
        """Records after `head`, an earlier end of this log, each with the end that it made."""
        self._file.seek(head.size)
        for line in self._file:
            record = self._checked(line, head)
            head = _after(head, line)
            yield record, head
        if head != self.head:
            raise self._chain.changed(f"its last line is not the one that {self._chain.head_path.name} knows")

    def _mend(self) -> Head:
        """The end of the log, after a crash set right."""
        file, head = self._file, self._chain.noted()
        if (size := os.fstat(file.fileno()).st_size) < head.size:
            raise self._chain.changed(f"it has {size} of {head.size} bytes")
        file.seek(head.size)
        rest = file.read()
        whole, torn = rest[: rest.rfind(b"\n") + 1], len(rest) - rest.rfind(b"\n") - 1
        if whole.count(b"\n") > 1:
            why = f"more than one line follows line {head.lines}, the last that was written"
            raise self._chain.changed(why)
        if torn:
            file.truncate(head.size + len(whole))
            os.fsync(file.fileno())
        if whole:
            self._checked(whole, head)
            head = self._note(_after(head, whole))
        return head

    def _note(self, head: Head) -> Head:
        write_atomic(self._chain.head_path, json.dumps(head.__dict__).encode(), mode=0o600)
        self.head = head
        return head

    def _checked(self, line: bytes, head: Head) -> Record:
        if (record := _parsed(line, head)) is None:
            raise self._chain.changed(
                f"line {head.lines + 1} or the one before it is not what was written there"
            )
        return record


def intact(content: bytes) -> list[tuple[Record, Head]]:
    """The records of a log up to its first damage, each with the end that it made."""
    found: list[tuple[Record, Head]] = []
    head = Head()
    for line in content.splitlines(keepends=True):
        if (record := _parsed(line, head)) is None:
            break
        head = _after(head, line)
        found.append((record, head))
    return found


def _parsed(line: bytes, head: Head) -> Record | None:
    """The record of a line that follows `head`; None if this is not such a line."""
    try:
        record: Record = json.loads(line)
        right = record["n"] == head.lines + 1 and record["before"] == head.digest and line == line_of(record)
    except (ValueError, KeyError, TypeError):
        return None
    return record if right else None


def _after(head: Head, line: bytes) -> Head:
    return Head(head.lines + 1, hashlib.sha256(line).hexdigest(), head.size + len(line))


def line_of(record: Record) -> bytes:
    """The line that holds a record."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
