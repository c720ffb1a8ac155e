"""From the sites' statistics to `metrics.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conf.files import no_space, write_atomic
from strategies.exact import Collect, Collected
from tasks.metrics import Statistics

Line = dict[str, Any]


class Metrics:
    """`metrics.jsonl`: an object a line, no times in it; an evaluation is there whole or not at all."""

    fold = Collect()

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[Line] = []
        if path.exists():
            self._lines = [json.loads(line) for line in path.read_text().splitlines()]

    def forget(self, after: int) -> None:
        """Drop what was measured after round `after`: those rounds will be repeated."""
        self._lines = [line for line in self._lines if line["round"] <= after]

    def has(self, round: int, model: str = "federated") -> bool:
        """Whether a model was scored in this round."""
        return any(line["round"] == round and line["model"] == model for line in self._lines)

    def add(self, lines: Iterable[Line]) -> None:
        """Add an evaluation; the file is replaced in one step."""
        self._lines += lines
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in self._lines)
        with no_space(self._path, "wardround resume"):
            write_atomic(self._path, text.encode())

    @staticmethod
    def lines(collected: Collected, zero: Statistics, round: int, split: str, model: str) -> list[Line]:
        """One line a site in the order of names, and one over all; a personal model is the site's own."""
        lines, total = [], zero
        for site in collected.rows:
            statistics = zero.from_vector(collected.answer(site)["statistics/sum"])
            total = total + statistics
            name = f"{model}:{site}" if model == "personal" else model
            lines.append(_line(statistics, round, split, name, site))
        if lines:
            lines.append(_line(total, round, split, model, "all"))
        return lines


def _line(statistics: Statistics, round: int, split: str, model: str, site: str) -> Line:
    head = {"round": round, "split": split, "model": model, "site": site, "patients": statistics.patients}
    return head | {name: float(value) for name, value in statistics.value().items()}
