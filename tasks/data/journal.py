"""What an ingest has done so far, so that a killed one is continued: a line a case, flushed as it ends."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from conf.files import no_space, write_atomic
from tasks.data.cache import VERSION, Record, plain, record_of


class Journal:
    """`journal.jsonl` of a cache. Its lines say what was read; the index alone says what counts."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.jsonl"
        self._lock = threading.Lock()

    def read(self) -> Mapping[str, Record]:
        """By source, what an interrupted ingest had done. A line that a crash tore is left out."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return {}
        records: dict[str, Record] = {}
        for line in lines:
            try:
                data = json.loads(line)
                if data["version"] == VERSION:
                    records[data["source"]] = record_of(data["source"], data["record"])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        return records

    @contextmanager
    def writing(self) -> Iterator[Journal]:
        """Open for `add`. What a power cut takes is read again: no fsync for each line."""
        with no_space(self.path, "ingest again"), self.path.open("ab") as self._file:
            self._file.write(b"\n")  # ends a torn line
            yield self

    def add(self, source: str, record: Record) -> None:
        """One case is done; its object, where it has one, is on disk."""
        data = {"version": VERSION, "source": source, "record": plain(record)}
        with self._lock:
            self._file.write(json.dumps(data).encode() + b"\n")
            self._file.flush()

    def drop(self, patient: str) -> None:
        """Forget what was done for a patient."""
        left = {s: r for s, r in self.read().items() if r.patient != patient}
        lines = [json.dumps({"version": VERSION, "source": s, "record": plain(r)}) for s, r in left.items()]
        if self.path.exists():
            with no_space(self.path, "repeat"):
                write_atomic(self.path, "".join(f"{line}\n" for line in lines).encode())

    def end(self) -> None:
        """The index holds it all."""
        self.path.unlink(missing_ok=True)
