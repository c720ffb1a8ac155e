"""`audit.jsonl`: a record of every request, decision and release."""

from __future__ import annotations

from pathlib import Path

from client.chain import Chain, Head, Record, Scalar
from conf.exits import Exit


class Audit(Chain):
    """The log of one site."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "audit log", Exit.AUDIT_BROKEN, "keep it, and find out who changed it")

    def add(self, event: str, **facts: Scalar) -> Head:
        """Write an event down, durably, before what it allows is done.

        Args:
            event: a word (`init`, `forget`, `request`, …). facts: what is needed to judge it later.

        Returns:
            The new head.

        Raises:
            Stop: (`AUDIT_BROKEN`) the log is not what was written; (`DISK_FULL`).
        """
        with self.open() as grip:
            return grip.add(event=event, **facts)

    def events(self) -> list[Record]:
        """Every event, each checked against the one before it.

        Raises:
            Stop: (`AUDIT_BROKEN`).
        """
        return self.records()
