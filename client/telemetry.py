"""What a site's agent counts, for the hospital's own Prometheus. Labels come from finite sets."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, start_http_server

from client.door import STAGES, Given
from strategies.failures import CODES
from strategies.letter import OPERATIONS, STATUSES

OUTCOMES = ("update", *CODES, "other")


class Meter:
    """Calls by what became of them, the trainer's work by stage and outcome, bytes."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self._calls = Counter("wardround_site_calls", "calls carried", ["operation", "status"], registry=own)
        self._work = Counter(
            "wardround_site_work", "replies of the trainer", ["stage", "outcome"], registry=own
        )
        self._seconds = Counter(
            "wardround_site_work_seconds", "seconds the trainer worked", ["stage"], registry=own
        )
        self._bytes = Counter("wardround_site_bytes", "packed trees", ["direction"], registry=own)
        for operation in OPERATIONS:
            for status in STATUSES:
                self._calls.labels(operation, status)
        for direction in ("down", "up"):
            self._bytes.labels(direction)

    def serve(self, port: int) -> None:
        """Show the numbers at `http://127.0.0.1:port/metrics`."""
        start_http_server(port, "127.0.0.1", registry=self.registry)

    def carried(self, operation: str, given: Given, down: int) -> None:
        """A call was carried in and its answer out."""
        answer = given.answer
        if operation in OPERATIONS:
            self._calls.labels(operation, answer.status).inc()
        self._bytes.labels("down").inc(down)
        self._bytes.labels("up").inc(len(answer.reply))
        if answer.status == "reply":
            # the trainer is the site's own; a newer one may still know words that this agent does not
            stage = given.stage if given.stage in STAGES else "other"
            outcome = given.outcome if given.outcome in OUTCOMES else "other"
            self._work.labels(stage, outcome).inc()
            self._seconds.labels(stage).inc(given.seconds)
