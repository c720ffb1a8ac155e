"""What a reservation costs beyond the disk, with many entries behind it.

    python bench/ledger.py [--entries 10000] [--folder /var/tmp]

The time inside fsync and rename is the disk's and taken off. Leaves with 1 beyond 5 ms.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from row import row

from client.budget import Budget
from client.chain import Head, line_of
from client.ledger import Ledger
from strategies.privacy.accountant import Entry

DISK = [0.0]


def clocked(call: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*arguments)
        finally:
            DISK[0] += time.perf_counter() - began

    return timed


def grow(path: Path, entries: int) -> None:
    """A ledger of many entries, of 200 kinds, written at once."""
    lines, digest = [], Head().digest
    for n in range(1, entries + 1):
        entry = vars(Entry(40.0 + n % 200 / 10, 0.001, 1))
        facts = {"kind": "reserve", "run": f"run{n // 100}", "population": "patients", "purpose": "training"}
        lines.append(
            line_of({"n": n, "time": "2026-01-01T00:00:00+00:00", **facts, **entry, "before": digest})
        )
        digest = hashlib.sha256(lines[-1]).hexdigest()
    path.write_bytes(b"".join(lines))
    head = {"lines": entries, "digest": digest, "size": path.stat().st_size}
    path.with_suffix(".head").write_text(json.dumps(head))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--entries", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, default=None)
    asked = parser.parse_args()
    os.fsync = clocked(os.fsync)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        path = Path(folder) / "ledger.jsonl"
        grow(path, asked.entries)
        book = Ledger(path, {"patients": Budget()})
        began = time.perf_counter()
        behind = len(book.lines()[0])
        opened = time.perf_counter() - began
        beyond, disk = [], []
        for n in range(200):
            DISK[0], began = 0.0, time.perf_counter()
            # every tenth is of a kind that was never there before
            book.reserve(Entry(60.0 + (n % 10 == 0) * n / 7, 0.001, 1), run="bench")
            beyond.append(1000 * (time.perf_counter() - began - DISK[0]))
            disk.append(1000 * DISK[0])
    print(f"{behind} entries behind, disk median {median(disk):.2f} ms")
    row("ledger: opened and checked, once per process", opened, "s")
    row("ledger: a reservation beyond fsync, median", median(beyond), "ms", 5)
    raise SystemExit(not row("ledger: the same, slowest of 200", max(beyond), "ms", 5))


if __name__ == "__main__":
    main()
