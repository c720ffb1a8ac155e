"""The site's numbers: words from finite sets, whatever the trainer says."""

from __future__ import annotations

from client.door import STAGES, Given
from client.telemetry import OUTCOMES, Meter
from strategies.letter import OPERATIONS, STATUSES, Answer


def test_words_that_are_not_known_are_other() -> None:
    meter = Meter()
    for stage, outcome in (("train", "update"), ("train", "memory"), ("doe_jane", "ct_1_2_3"), ("", "")):
        meter.carried("train", Given(Answer("reply", "", b"123"), stage, outcome, 2.0), 10)
    meter.carried("doe_jane", Given(Answer("away", "")), 0)

    def value(name: str, **labels: str) -> float | None:
        return meter.registry.get_sample_value(name, labels)

    assert value("wardround_site_work_total", stage="train", outcome="update") == 1
    assert value("wardround_site_work_total", stage="train", outcome="memory") == 1
    assert value("wardround_site_work_total", stage="other", outcome="other") == 2
    assert value("wardround_site_work_seconds_total", stage="train") == 4
    assert value("wardround_site_bytes_total", direction="up") == 12
    seen = {word for metric in meter.registry.collect() for s in metric.samples for word in s.labels.values()}
    assert seen <= {*STAGES, *OUTCOMES, *OPERATIONS, *STATUSES, "up", "down"}
