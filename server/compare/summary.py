"""`wardround compare`: models over folds, repeats and methods, with paired intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer

from conf.exits import Exit, Stop
from server.compare.gather import Method, gather
from server.compare.resample import DRAWS, Interval, Scored, by_folds, difference, own
from server.report.table import ABSENT, METRICS, place

_FEW = 20
_FACTS = {"round", "split", "model", "site", "patients"}


@dataclass(frozen=True)
class Row:
    """A model's metric.

    Attributes:
        folds: its value in each fold of each repeat. whole: over the out-of-fold patients together.
    """

    name: str
    folds: tuple[float, ...]
    patients: int
    whole: Interval | None

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        whole = None if self.whole is None else self.whole.plain()
        mean = float(np.mean(self.folds))
        return {
            "model": self.name,
            "mean": mean,
            "folds": list(self.folds),
            "patients": self.patients,
            "whole": whole,
        }


@dataclass(frozen=True)
class Gap:
    """One model minus another; `where`: on which patients, if not on all."""

    one: str
    other: str
    where: str
    interval: Interval

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "model": self.one,
            "minus": self.other,
            "patients": self.where or "all",
            **self.interval.plain(),
        }


@dataclass(frozen=True)
class Summary:
    """What a comparison comes to."""

    metric: str
    split: str
    rows: tuple[Row, ...]
    gaps: tuple[Gap, ...]
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "metric": self.metric,
            "split": self.split,
            "models": [row.plain() for row in self.rows],
            "differences": [gap.plain() for gap in self.gaps],
            "notes": list(self.notes),
        }


def compare(paths: Sequence[Path], metric: str | None = None, site: str | None = None) -> Summary:
    """Compare the models of some runs: folds, repeats and methods over the same data.

    Args:
        metric: its key; none: the first known one that the runs have. site: only this one's patients count.

    Raises:
        Stop: (`NO_RUN`, `CONFIG`) a run is none, they do not belong together, or none has the metric.
    """
    methods = gather(paths, site)
    records = [r for m in methods for run in m.runs for r in run.last.values()]
    have = {key for record in records for key in record} - _FACTS
    metric = metric or next((name for name in METRICS if name in have), "loss")
    if metric not in have:
        raise Stop(Exit.CONFIG, f"metric is {metric!r}; these runs have: {', '.join(sorted(have))}")
    for m in methods:
        if not any(metric in run.last.get((model, m.site), {}) for run in m.runs for model in m.models):
            raise Stop(Exit.CONFIG, f"{m.runs[0].path} has no {metric}; these runs do not belong together")
    rows = tuple(
        row for m in methods for model in sorted(m.models, key=place) if (row := _row(m, model, metric))
    )
    gaps = tuple(_gaps(methods, metric))
    where = methods[0].runs[0].split + (f" at {site}" if site else "")
    return Summary(metric, where, rows, gaps, tuple(_notes(methods, rows, gaps)))


def _row(method: Method, model: str, metric: str) -> Row | None:
    values, series = method.by_fold(model, metric), method.series(model)
    if not values:
        return None
    patients = len({float(p) for s in (series or {}).values() for p in s.patients})
    if not patients:
        first = min(run.repeat for run in method.runs)
        patients = sum(
            int(r.last.get((model, method.site), {}).get("patients", 0))
            for r in method.runs
            if r.repeat == first
        )
    whole = None if series is None else own(metric, series)
    return Row(_called(method, model), tuple(values[k] for k in sorted(values)), patients, whole)


def _gaps(methods: Sequence[Method], metric: str) -> Iterator[Gap]:
    """The federated model minus each other one, minus a site's own on the others' patients, and by method."""
    for method in methods:
        for model in sorted(set(method.models) - {"federated"}, key=place):
            yield from _gap((method, "federated"), (method, model), metric)
        # contiguous stretches of one specimen: its test part is nobody's own
        shared = method.runs[0].settings.data.partition == "contiguous"
        for model in sorted(m for m in method.models if m.startswith("local:") and not shared):
            yield from _gap((method, "federated"), (method, model), metric, elsewhere=model[len("local:") :])
    for method in methods[1:]:
        yield from _gap((method, "federated"), (methods[0], "federated"), metric)


def _gap(
    one: tuple[Method, str], other: tuple[Method, str], metric: str, elsewhere: str = ""
) -> Iterator[Gap]:
    """One gap, or none where the models share no fold; `elsewhere`: without this site's patients."""
    names, found = (_called(*one), _called(*other)), None
    first, second = one[0].series(one[1]), other[0].series(other[1])
    if first and second:
        if elsewhere:
            first, second = ({r: _without(s, elsewhere) for r, s in m.items()} for m in (first, second))
        found = difference(metric, first, second)
    if found is None and not elsewhere:
        mine, yours = one[0].by_fold(one[1], metric), other[0].by_fold(other[1], metric)
        if both := sorted(mine.keys() & yours.keys()):
            found = by_folds([mine[k] - yours[k] for k in both], one[0].runs[0].settings.data.folds)
    if found is not None:
        yield Gap(*names, f"not of {elsewhere}" if elsewhere else "", found)


def _without(scored: Scored, site: str) -> Scored:
    return scored.only(scored.site != site)


def _called(method: Method, model: str) -> str:
    return f"{model} ({method.name})" if method.name else model


def _notes(methods: Sequence[Method], rows: Sequence[Row], gaps: Sequence[Gap]) -> Iterator[str]:
    for method in methods:
        folds = method.runs[0].settings.data.folds
        for repeat in sorted({run.repeat for run in method.runs}):
            have = {run.settings.data.fold for run in method.runs if run.repeat == repeat}
            if folds and len(have) < folds:
                missing = ", ".join(str(k) for k in sorted(set(range(folds)) - have))
                what = f" of {method.name}" if method.name else ""
                yield f"folds {missing} of {folds} are missing{what} (seeds {repeat[0]}, {repeat[1]})"
    methods_used = {gap.interval.method for gap in gaps}
    if "bootstrap" in methods_used:
        yield (
            f"95 % intervals: bootstrap over patients, {DRAWS} draws, the same for all models and repeats; "
            "they do not cover training anew"
        )
        if (few := min(row.patients for row in rows)) < _FEW:
            yield f"only {few} patients: intervals of the bootstrap are too narrow"
    if "folds" in methods_used:
        yield (
            "no patients' scores, or they do not tell the metric: 95 % t-intervals over folds, corrected for "
            "overlapping training sets (Nadeau and Bengio 2003)"
        )


def show(made: Summary) -> None:
    """Print the summary."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    models = Table(box=box.SIMPLE_HEAD, title=f"{made.metric} on {made.split}", title_justify="left")
    for column in ("model", "patients", "folds", "mean", "deviation", "out of fold"):
        models.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for row in made.rows:
        spread = f"{np.std(row.folds, ddof=1):.3f}" if len(row.folds) > 1 else ABSENT
        whole = ABSENT if row.whole is None else _text(row.whole, "")
        cells = (row.name, str(row.patients), str(len(row.folds)), f"{np.mean(row.folds):.3f}", spread, whole)
        models.add_row(*cells, style="bold" if row.name.startswith("federated") else None)
    gaps = Table(box=box.SIMPLE_HEAD, title="differences, paired", title_justify="left")
    for column in ("model", "minus", "patients", "difference", "excludes 0"):
        gaps.add_column(column, justify="left" if column in ("model", "minus") else "right", no_wrap=True)
    for gap in made.gaps:
        low, high = gap.interval.low, gap.interval.high
        clear = ABSENT if low is None or high is None else "yes" if low > 0 or high < 0 else "no"
        gaps.add_row(gap.one, gap.other, gap.where or "all", _text(gap.interval, "+"), clear)
    console = Console(highlight=False, markup=False)
    for table in (models, gaps) if made.gaps else (models,):
        console.width = max(console.width, Console(width=10_000).measure(table).maximum)
        console.print(table)
    for note in made.notes:
        typer.echo(note)


def _text(interval: Interval, sign: str) -> str:
    value = f"{interval.value:{sign}.3f}"
    if interval.low is None or interval.high is None:
        return value
    return f"{value} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"
