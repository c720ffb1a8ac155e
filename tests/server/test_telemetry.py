"""The coordinator's numbers, over a run whose course is known."""

from __future__ import annotations

from server.telemetry import Meter
from strategies.protocol import CODES, Failure


def test_counts_of_a_known_course() -> None:
    meter = Meter()
    for event in ("start", "ask", "answer", "fold", "checkpoint", "ask", "answer", "fold", "evaluate"):
        meter.watch(event, 4)
    meter.heard(None)
    meter.heard(Failure("memory"))
    meter.carried(down=10)
    meter.carried(up=3)

    def value(name: str, **labels: str) -> float | None:
        return meter.registry.get_sample_value(name, labels)

    assert value("wardround_round") == 4
    assert value("wardround_rounds_total") == 1
    assert value("wardround_replies_total") == 1
    assert {code: value("wardround_failures_total", code=code) for code in CODES} == {
        code: float(code == "memory") for code in CODES
    }
    assert value("wardround_bytes_total", direction="down") == 10
    assert value("wardround_bytes_total", direction="up") == 3
    assert all((value("wardround_phase_seconds_total", phase=p) or 0) > 0 for p in ("exchange", "checkpoint"))
