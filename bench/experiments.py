"""Run the experiments on real data and write their tables into docs/results.md and README.md.

    python bench/experiments.py DATA [hippocampus] [lungs] [pneumonia] [heart] [nuclei] [membrane]

DATA holds the data sets, each in its own folder. Runs are kept below runs/. Of an experiment with folds all
are run, and the table is `wardround compare`'s.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from conf.load import compose
from conf.schema import Settings
from server.compare.resample import Interval
from server.compare.summary import Summary, compare
from server.report.examples import examples
from server.report.figure import figure
from server.report.table import records, results
from server.simulate import simulate

PROJECT = Path(__file__).parents[1]
FOLDERS = {
    "hippocampus": "msd_hippocampus",
    "lungs": "lung_cxr_2site",
    "pneumonia": "cxr_pneumonia",
    "heart": "fed_heart_uci",
    "nuclei": "bbbc038_nuclei",
    "membrane": "isbi2012_em",
}
ONCE = ("nuclei", "membrane")
"""What the README does not repeat."""
MORE = {"nuclei": ("lesion_f1_mean",)}
"""Metrics shown beside the first one."""


def settings_of(name: str, data: Path, run: Path, *more: str) -> Settings:
    """An experiment's settings with every baseline."""
    made = compose([f"+experiment={name}", "data.root=.", "baselines=[trivial,pooled,local]", *more])
    return made.model_copy(
        update={
            "data": made.data.model_copy(update={"root": str(data / FOLDERS[name])}),
            "run": made.run.model_copy(update={"dir": str(run)}),
        }
    )


def minutes(run: Path) -> float:
    """What training and evaluation of the federated model took."""
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    return sum(part for line in timing for key, part in line.items() if key != "round") / 60


def measure(name: str, data: Path) -> str:
    """Run one experiment with every baseline; its table as Markdown, with how it was made."""
    run = PROJECT / "runs" / f"experiment-{name}"
    settings = settings_of(name, data, run)
    if settings.data.folds:
        return cross_validate(name, data, run, settings.data.folds)
    simulate(settings)
    if settings.plan.task.name == "segmentation":
        figure(run, examples(run), run / "figure.png")  # stays with the run: its slices are patients
    made = results(records(run))
    return "\n\n".join(
        (
            f"`wardround simulate +experiment={name} data.root=DATA/{FOLDERS[name]} "
            f"'baselines=[trivial,pooled,local]'`",
            made.markdown(),
            f"{made.title}; patients in brackets. {settings.plan.federation.rounds} rounds of "
            f"{settings.plan.local.steps} steps; training and evaluation of the federated model took "
            f"{minutes(run):.1f} minutes.",
        )
    )


def cross_validate(name: str, data: Path, run: Path, folds: int) -> str:
    """Run every fold; the summary of all as Markdown."""
    runs = [run.with_name(f"{run.name}-{k}") for k in range(folds)]
    for k, each in enumerate(runs):
        settings = settings_of(name, data, each, f"data.fold={k}")
        simulate(settings)
    took = [minutes(each) for each in runs]
    return "\n\n".join(
        (
            f"`wardround simulate -m +experiment={name} data.root=../shared/data/{FOLDERS[name]} "
            f"run.dir=runs/{name} 'baselines=[trivial,pooled,local]' "
            f"data.fold={','.join(map(str, range(folds)))}`, then `wardround compare runs/{name}-*`",
            summarised(runs, MORE.get(name, ())),
            f"{folds} folds; {settings.plan.federation.rounds} rounds of {settings.plan.local.steps} steps; "
            f"training and evaluation of the federated model took {max(took):.1f} minutes a fold.",
        )
    )


def summarised(runs: Sequence[Path], more: Sequence[str] = ()) -> str:
    """Out of fold: a model to a row, a site to a column, then the federated model less each other one."""
    whole = compare(runs)
    tested = (r for run in runs for r in records(run) if r["split"] == "test" and r["site"] != "all")
    sites = sorted({str(r["site"]) for r in tested})
    sites = sites if len(sites) > 1 else []  # a specimen's test part belongs to no site
    parts = [compare(runs, site=site) for site in sites]
    others = [compare(runs, metric) for metric in more]
    gaps = {gap.other: gap.interval for gap in whole.gaps if gap.one == "federated" and not gap.where}
    header = ("model", *sites, "all", *more, "federated less it")
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for row in whole.rows:
        less = interval(gaps[row.name], "+") if row.name in gaps else ""
        cells = [cell(made, row.name) for made in (*parts, whole, *others)]
        lines.append("| " + " | ".join((row.name, *cells, less)) + " |")
    return "\n".join(lines)


def cell(made: Summary, model: str) -> str:
    """What a summary says of a model, out of fold."""
    found = [row for row in made.rows if row.name == model and row.whole is not None]
    return interval(found[0].whole, "") if found and found[0].whole else "–"


def interval(given: Interval, sign: str) -> str:
    """As the other tables have it."""
    bounds = "" if given.low is None else f" [{given.low:{sign}.3f}–{given.high:{sign}.3f}]"
    return f"{given.value:{sign}.3f}{bounds}"


def insert(file: Path, name: str, text: str) -> None:
    """Replace what stands between the two markers of `name`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    old = file.read_text(encoding="utf-8")
    if begin not in old or end not in old:
        raise ValueError(f"{file} has no markers {begin} and {end}; put them where the table belongs")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    new = re.sub(pattern, lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL)
    file.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    for experiment in sys.argv[2:] or FOLDERS:
        written = measure(experiment, Path(sys.argv[1]))
        insert(PROJECT / "docs" / "results.md", experiment, written)
        if experiment not in ONCE:
            insert(PROJECT / "README.md", experiment, written.split("\n\n")[1])
