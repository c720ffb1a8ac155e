"""The result table of a run, from `metrics.jsonl`: a model to a row, a hospital to a column."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from conf.exits import Exit, Stop

if TYPE_CHECKING:
    from rich.table import Table

Record = Mapping[str, Any]
#: what a table shows where nobody chose: the first of these that the run has
METRICS = ("dice_mean", "kappa_quadratic", "auroc", "accuracy", "psnr", "mae", "tstr", "frechet", "loss")
#: order of rows; what a site trained stands in between, by name
MODELS = ("federated", "personal", "pooled", "local", "linear", "atlas", "identity", "constant")
ABSENT = "–"


@dataclass(frozen=True)
class Results:
    """One metric of every model at every hospital.

    Attributes:
        metric, split: what is shown, and on which patients.
        header: column titles; the first is that of the row names.
        rows: one per model, as many cells as `header`.
    """

    metric: str
    split: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def title(self) -> str:
        """What the numbers are."""
        return f"{self.metric} on {self.split} (95 % interval where there is one)"

    def markdown(self) -> str:
        """As a Markdown table."""
        lines = [self.header, ("---",) + ("---:",) * (len(self.header) - 1), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def records(run: Path) -> list[Record]:
    """All evaluations of a run, in the order they were made.

    Raises:
        Stop: (`NO_RUN`) no evaluations there, or not readable.
    """
    file = run / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]
    except OSError:
        raise Stop(Exit.NO_RUN, f"{run} is not a run: it has no readable metrics.jsonl") from None
    except ValueError:
        raise Stop(Exit.NO_RUN, f"{file} is damaged: a line of it is not JSON") from None


def final(found: Sequence[Record]) -> dict[tuple[str, str], Record]:
    """The last evaluation by model and site, on test patients where there are any."""
    split = "test" if any(record["split"] == "test" for record in found) else "val"
    in_order = sorted(found, key=lambda record: record["round"])
    return {(r["model"], r["site"]): r for r in in_order if r["split"] == split}


def results(found: Sequence[Record], metric: str | None = None) -> Results:
    """The last evaluation of every model at every hospital, on test patients where there are any.

    Args:
        found: as from `records`.
        metric: its key; none: the first known one that the run has.

    Raises:
        Stop: (`NO_RUN`) nothing was evaluated; (`CONFIG`) the run has no such metric.
    """
    if not found:
        raise Stop(Exit.NO_RUN, "the run has no evaluation yet; continue it with wardround resume")
    have = {key for record in found for key in record}
    asked, metric = metric, metric or next((name for name in METRICS if name in have), "loss")
    if asked and metric not in have:
        facts, beside = ("round", "split", "model", "site"), ("_lo", "_hi", "_bound")
        known = ", ".join(sorted(k for k in have.difference(facts) if not k.endswith(beside)))
        raise Stop(Exit.CONFIG, f"metric is {metric!r}; this run has: {known}")
    split = "test" if any(record["split"] == "test" for record in found) else "val"
    # later evaluations replace earlier ones
    last = {
        (r["model"], r["site"]): r for r in sorted(found, key=lambda r: r["round"]) if r["split"] == split
    }
    sites = sorted({site for _, site in last} - {"all"})
    columns = [*sites, "all"]
    models = sorted({model for model, _ in last}, key=place)
    return Results(
        metric=metric,
        split=split,
        header=("model", *(f"{site} ({_patients(last, site)})" for site in columns)),
        rows=tuple(
            (model, *(_cell(last.get((model, site)), metric) for site in columns)) for model in models
        ),
    )


def promise(run: Path) -> str:
    """What a run with differential privacy promises a patient, in a line; empty for another run."""
    try:
        made = json.loads((run / "privacy.json").read_bytes())
    except OSError:
        return ""
    one, other = (
        "without bound" if made[key] is None else f"{made[key]:.4f}"
        for key in ("epsilon", "epsilon_replace_one")
    )
    return (
        f"privacy: epsilon {one} at delta {made['delta']:g} for a {made['unit'].partition(',')[0]}, by PRV "
        f"({other} for one in another's place); {made['not_covered'][0]}"
    )


def show(run: Path, *, metric: str | None = None, markdown: bool = False) -> None:
    """Print a run's result table on standard output.

    Raises:
        Stop: as `records` and `results`.
    """
    made = results(records(run), metric)
    if markdown:
        typer.echo(made.markdown())
        return
    draw(made)
    typer.echo(f"patients in brackets; run: {run}")
    if line := promise(run):
        typer.echo(line)


def draw(made: Results) -> None:
    """Print a result table on standard output."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=made.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False
    )
    for position, column in enumerate(made.header):
        table.add_column(column.replace(" (", "\n("), justify="right" if position else "left", no_wrap=True)
    for row in made.rows:
        # the interval goes below its value: five columns fit a terminal of 80
        cells = (cell.replace(" [", "\n[") for cell in row)
        table.add_row(*cells, style="bold" if row[0] == "federated" else None)
    whole(table)


def whole(table: Table) -> None:
    """Print a table as wide as it is: beyond the terminal, lines wrap; numbers are never cut."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.width = max(console.width, Console(width=10_000).measure(table).maximum)
    console.print(table)


def place(model: str) -> tuple[int, str]:
    """The key by which rows are sorted."""
    kind = model.partition(":")[0]
    return (MODELS.index(kind) if kind in MODELS else len(MODELS), model)


def _patients(last: Mapping[tuple[str, str], Record], site: str) -> int:
    counts: Iterable[int] = (record["patients"] for (_, at), record in last.items() if at == site)
    return max(counts, default=0)


def _cell(record: Record | None, metric: str) -> str:
    if record is None or metric not in record:
        return ABSENT
    low, high = record.get(f"{metric}_lo"), record.get(f"{metric}_hi")
    interval = "" if low is None or high is None else f" [{low:.3f}–{high:.3f}]"
    bound = record.get(f"{metric}_bound")  # of a rank from bins: how far the exact one may be off
    return f"{record[metric]:.3f}{f' ±{bound:.4f}' if bound else ''}{interval}"
