"""Run the experiments on real data and write their tables into docs/results.md and README.md.

    python bench/experiments.py DATA [hippocampus] [lungs] [pneumonia] [heart]

DATA holds the data sets, each in its own folder. Runs are kept below runs/.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from conf.load import compose
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
}


def measure(name: str, data: Path) -> str:
    """Run one experiment with every baseline; its table as Markdown, with how it was made."""
    settings = compose([f"+experiment={name}", "data.root=.", "baselines=[trivial,pooled,local]"])
    run = PROJECT / "runs" / f"experiment-{name}"
    settings = settings.model_copy(
        update={
            "data": settings.data.model_copy(update={"root": str(data / FOLDERS[name])}),
            "run": settings.run.model_copy(update={"dir": str(run)}),
        }
    )
    simulate(settings)
    if settings.plan.task.name == "segmentation":
        figure(run, examples(run), run / "figure.png")  # stays with the run: its slices are patients
    timing = [json.loads(line) for line in (run / "timing.jsonl").read_text().splitlines()]
    seconds = sum(part for line in timing for key, part in line.items() if key != "round")
    made = results(records(run))
    return "\n\n".join(
        (
            f"`wardround simulate +experiment={name} data.root=DATA/{FOLDERS[name]} "
            f"'baselines=[trivial,pooled,local]'`",
            made.markdown(),
            f"{made.title}; patients in brackets. {settings.plan.federation.rounds} rounds of "
            f"{settings.plan.local.steps} steps; training and evaluation of the federated model took "
            f"{seconds / 60:.1f} minutes.",
        )
    )


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
        insert(PROJECT / "README.md", experiment, written.split("\n\n")[1])
