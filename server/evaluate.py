"""From the sites' statistics to `metrics.jsonl`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from conf.exits import Exit, Stop
from conf.files import no_space, write_atomic
from conf.schema import Plan
from strategies.exact import Collect, Collected
from strategies.privacy.metrics import covers, told
from tasks.base import build_task
from tasks.metrics import Statistics

Line = dict[str, Any]
_HEAD = ("round", "split", "model", "site", "patients")

LESS = {"loss", "error", "nll", "brier", "ece", "mae", "mse", "rmse", "hd95", "assd", "frechet", "fid", "mmd"}
"""Words in a metric's name that say that less of it is better."""


def check_metric(plan: Plan) -> None:
    """Refuse a metric that validation cannot have, before anything is written.

    Raises:
        Stop: (`CONFIG`) with those that it can.
    """
    name = plan.federation.metric.removeprefix("-")
    if not plan.federation.by_validation:
        return
    known = build_task(plan).statistics().names()
    if name not in known:
        listed = ", ".join(sorted(n for n in known if not n.endswith(("_lo", "_hi", "_bound"))))
        raise Stop(Exit.CONFIG, f"federation.metric is {plan.federation.metric!r}; validation has: {listed}")


class Metrics:
    """`metrics.jsonl`: an object a line, no times in it; an evaluation is there whole or not at all."""

    fold = Collect()

    def __init__(self, path: Path, plan: Plan) -> None:
        self._path, self._plan = path, plan
        self._lines: list[Line] = []
        if path.exists():
            self._lines = [json.loads(line) for line in path.read_text().splitlines()]

    def forget(self, after: int) -> None:
        """Drop what was measured after round `after`, and its end: those rounds will be repeated."""
        left = [line for line in self._lines if line["round"] <= after]
        if len(left) < len(self._lines):
            self._lines = [line for line in left if line["split"] != "test"]

    def has(self, round: int, model: str = "federated", split: str = "") -> bool:
        """Whether a model was scored in this round, on this split where one is named."""
        return any(
            line["round"] == round and line["model"] == model and split in ("", line["split"])
            for line in self._lines
        )

    def of(self, *models: str) -> list[Line]:
        """The lines of some models, in order."""
        return [line for line in self._lines if line["model"] in models]

    def best(self, metric: str) -> tuple[int, int]:
        """The round with the best federated model on validation (the first of equals), evaluations since.

        Under noise an evaluation may lack a metric: then it is no gain.

        Raises:
            Stop: (`CONFIG`) no such metric.
        """
        name = metric.removeprefix("-")
        sign = -1 if name != metric or LESS & set(name.split("_")) else 1
        best, value, since = 0, -math.inf, 0
        for line in self._lines:
            if (line["model"], line["site"], line["split"]) != ("federated", "all", "val"):
                continue
            if name not in line and not covers(self._plan, "federated"):
                known = ", ".join(sorted(line.keys() - set(_HEAD)))
                raise Stop(Exit.CONFIG, f"federation.metric is {metric!r}; validation has: {known}")
            since += 1
            if (gain := sign * line.get(name, math.nan)) > value:
                best, value, since = line["round"], gain, 0
        return best, since

    def add(self, lines: Iterable[Line]) -> None:
        """Add an evaluation; the file is replaced in one step."""
        self._lines += lines
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in self._lines)
        with no_space(self._path, "wardround resume"):
            write_atomic(self._path, text.encode())

    def lines(self, collected: Collected, zero: Statistics, round: int, split: str, model: str) -> list[Line]:
        """One line a site in the order of names, and one over all; a personal model is the site's own.

        Patients' own scores, where sites tell them, go to `scores/`: the latest of each model and split.
        """
        lines, total, counts = [], zero, []
        line = _noised_line if covers(self._plan, model) else line_of
        for site in collected.rows:
            statistics = zero.from_vector(collected.answer(site)["statistics/sum"])
            counts.append(len(statistics.rows))
            total = total + statistics
            name = f"{model}:{site}" if model == "personal" else model
            lines.append(line(statistics, round, split, name, site))
        if lines:
            lines.append(line(total, round, split, model, "all"))
        if any(counts):
            about = {"round": round, "split": split, "model": model, "sites": list(collected.rows)}
            self._keep(total, torch.tensor(counts), about)
        return lines

    def _keep(self, total: Statistics, counts: Tensor, about: dict[str, Any]) -> None:
        """Write the patients' scores: `rows` and, for each, `site`, as safetensors."""
        name = f"{about['model']}-{about['split']}".replace(":", "-")
        path = self._path.parent / "scores" / f"{name}.safetensors"
        site = torch.arange(len(counts)).repeat_interleave(counts)
        text = json.dumps({**about, "columns": total.columns}, sort_keys=True, separators=(",", ":"))
        blob = safetensors.torch.save({"rows": total.rows, "site": site}, metadata={"wardround": text})
        with no_space(path, "wardround resume"):
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, blob)


def line_of(statistics: Statistics, round: int, split: str, model: str, site: str) -> Line:
    """What stands in `metrics.jsonl` of a model's statistics at a site."""
    head = {"round": round, "split": split, "model": model, "site": site, "patients": statistics.patients}
    return head | {name: float(value) for name, value in statistics.value().items()}


def _noised_line(statistics: Statistics, round: int, split: str, model: str, site: str) -> Line:
    """The same of noised sums: no metric of what stayed home, and no interval, which knows no noise."""
    line = line_of(statistics, round, split, model, site)
    line["patients"] = max(0, statistics.patients)
    known = {
        n for n, v in told(statistics).value().items() if math.isfinite(v) and n[-3:] not in ("_lo", "_hi")
    }
    return {n: v for n, v in line.items() if n in known or n in _HEAD}
