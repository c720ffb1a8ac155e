"""What the coordinator counts, for Prometheus. Labels come from finite sets, never from a site or a run."""

from __future__ import annotations

import time

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from strategies.protocol import CODES, Failure

PHASES = ("exchange", "checkpoint", "evaluate")


class Meter:
    """Rounds, seconds by phase, bytes, replies, failures by code."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self._round = Gauge("wardround_round", "the round that is under way, or was last", registry=own)
        self._rounds = Counter("wardround_rounds", "rounds that reached their checkpoint", registry=own)
        self._seconds = Counter("wardround_phase_seconds", "seconds spent", ["phase"], registry=own)
        self._bytes = Counter("wardround_bytes", "packed trees", ["direction"], registry=own)
        self._replies = Counter("wardround_replies", "replies that were folded", registry=own)
        self._failures = Counter("wardround_failures", "asks of a site that failed", ["code"], registry=own)
        # a series that is not there until it first happens cannot be alerted on
        for phase in PHASES:
            self._seconds.labels(phase)
        for direction in ("down", "up"):
            self._bytes.labels(direction)
        for code in CODES:
            self._failures.labels(code)
        self._since = time.monotonic()
        self._asked = self._since

    def serve(self, port: int) -> None:
        """Show the numbers at `http://127.0.0.1:port/metrics`."""
        start_http_server(port, "127.0.0.1", registry=self.registry)

    def watch(self, event: str, round: int) -> None:
        """An event of the round loop (`server.rounds.Watch`)."""
        now = time.monotonic()
        match event:
            case "start":
                self._round.set(round)
            case "ask":
                self._asked = now
            case "fold":
                self._seconds.labels("exchange").inc(now - self._asked)
                self._since = now
            case "checkpoint" | "evaluate":
                self._seconds.labels(event).inc(now - self._since)
                self._since = now
                if event == "checkpoint":
                    self._rounds.inc()

    def heard(self, failure: Failure | None) -> None:
        """A site has answered, or failed."""
        if failure is None:
            self._replies.inc()
        else:
            self._failures.labels(failure.code).inc()

    def carried(self, down: int = 0, up: int = 0) -> None:
        """Bytes sent to a site, or received from one."""
        self._bytes.labels("down").inc(down)
        self._bytes.labels("up").inc(up)
