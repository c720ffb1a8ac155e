"""A ledger that was deleted, rolled back or damaged is brought forward again: never backward.

What is left of it and a backup are read up to their first damage. Where they part, both count: each line
may stand for a release that was made. If the anchor or the head beside the ledger stands in neither, releases
are missing that nobody here remembers; then the hospital has to declare what they were.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.chain import Head, Record, intact, line_of
from client.ledger import Ledger, Line, chain
from conf.exits import Exit, Stop
from conf.files import no_space, write_atomic
from strategies.privacy.accountant import Entry

_Lines = list[tuple[Record, Head]]


@dataclass(frozen=True)
class Restored:
    """What a restore did: releases in the ledger now, those charged by it, a copy of what it replaced."""

    lines: int
    added: int
    kept: Path | None


def restore(path: Path, backup: Path, anchor: bytes, lost: Sequence[Entry], population: str) -> Restored:
    """Put a whole ledger at `path`, that holds all that is known to have been released.

    Args:
        anchor: its last head, as somebody else keeps it. lost: what was released after the last known line,
            where the anchor stands in neither file; it is charged to `population`.

    Raises:
        Stop: (`CONFIG`) the backup cannot be read or holds no line, or nothing was lost that is declared;
            (`LEDGER_BROKEN`) releases are missing and none is declared; (`DISK_FULL`).
    """
    try:
        saved = intact(backup.read_bytes())
    except OSError as error:
        raise Stop(Exit.CONFIG, f"backup {backup} cannot be read ({error.strerror})") from None
    if not saved:
        raise Stop(Exit.CONFIG, f"backup {backup} is no ledger: its first line is none; give a ledger.jsonl")
    with chain(path).aside() as there:
        left = intact(there)
        # the one that holds the anchor goes on, else the longer
        base, other = sorted((left, saved), key=lambda lines: (_holds(lines, anchor), len(lines)))[::-1]
        ends = [anchor, *_noted(path)]
        unknown = [end.hex() for end in ends if not _holds(left, end) and not _holds(saved, end)]
        if lost and not unknown:
            text = "both heads stand in the ledger or its backup, so nothing is missing; leave --lost out"
            raise Stop(Exit.CONFIG, text)
        if unknown and not lost:
            raise Stop(
                Exit.LEDGER_BROKEN,
                f"neither {path} ({len(left)} lines) nor {backup} ({len(saved)} lines) ever ended with"
                f" {unknown[0]}: releases are missing; find a newer backup, or declare what was released"
                " since, with its steps rounded up: --lost SIGMA,Q,STEPS",
            )
        missing = [(line.entry, line.run, line.population, line.purpose) for line in _apart(other, base)]
        missing += [(entry, "declared", population, "training") for entry in lost]
        kept = _keep(path, there)
        with no_space(path, "repeat"), tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name
            chain(whole).replace(_content(base), base[-1][1])
            Ledger(whole, None).bring_forward(missing, ends)
            made = intact(whole.read_bytes())
            chain(path).replace(whole.read_bytes(), made[-1][1])
    return Restored(len(_reservations(made)), len(missing), kept)


def _noted(path: Path) -> list[bytes]:
    """The end that the ledger's own head knows, if it can be read: an anchor too."""
    try:
        return [bytes.fromhex(chain(path).noted().digest)]
    except Stop:
        return []


def _holds(lines: _Lines, anchor: bytes) -> bool:
    known = {head.digest for _, head in lines} | {Head().digest}
    known |= {record["anchor"] for record, _ in lines if record.get("kind") == "restore"}
    return anchor.hex() in known


def _apart(other: _Lines, base: _Lines) -> list[Line]:
    """The reservations of `other` that `base` does not have."""
    shared = {head.digest for _, head in base}
    return _reservations([(record, head) for record, head in other if head.digest not in shared])


def _reservations(lines: _Lines) -> list[Line]:
    return [Line.of(record) for record, _ in lines if record.get("kind") == "reserve"]


def _content(lines: _Lines) -> bytes:
    return b"".join(line_of(record) for record, _ in lines)


def _keep(path: Path, content: bytes) -> Path | None:
    """A copy of what is replaced: it may be evidence."""
    if not content:
        return None
    kept = next(
        p for n in range(1, 10_000) if not (p := path.with_name(f"{path.name}.replaced-{n}")).exists()
    )
    write_atomic(kept, content, mode=0o600)
    return kept
