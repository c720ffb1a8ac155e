"""`wardround demo`: the whole way from DICOM to a result table, on generated patients. A smoke test."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean

import typer

from conf.exits import Exit, Stop
from conf.load import compose
from server.report.examples import examples
from server.report.figure import figure
from server.report.table import Record, final, records, show
from server.simulate import simulate
from tasks.data.phantom import make_phantom
from tasks.data.phantom_files import MIXED


def demo(folder: Path | None = None) -> Path:
    """Generate three hospitals, train, compare with single hospitals, pooled training and the atlas, draw.

    Args:
        folder: a new one; none: `demo/<UTC time>`.

    Returns:
        The run's directory.

    Raises:
        Stop: (`RUN_EXISTS`) the folder exists.
    """
    folder = folder or Path("demo") / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    if folder.exists():
        raise Stop(Exit.RUN_EXISTS, f"{folder} exists; choose another: wardround demo --out DIR")
    hospitals = folder / "hospitals"
    typer.echo(f"generating three hospitals in {hospitals}")
    make_phantom(hospitals, hospitals=3, forms=MIXED)
    composed = compose(["+experiment=demo", "data.root=.", "run.dir=."])
    settings = composed.model_copy(
        update={
            "data": composed.data.model_copy(update={"root": str(hospitals), "cache": str(folder / "cache")}),
            "run": composed.run.model_copy(update={"dir": str(folder / "run")}),
        }
    )
    run = simulate(settings)
    picture = run / "figure.png"
    figure(run, examples(run), picture)
    show(run)
    typer.echo(summary(final(records(run)), "dice_mean"))
    newest = max((run / "checkpoints").iterdir())
    for name, path in (
        ("patients", hospitals),
        ("run", run),
        ("metrics", run / "metrics.jsonl"),
        ("model", newest / "model.safetensors"),
        ("picture", picture),
    ):
        typer.echo(f"{name:>9}: {path}")
    return run


def summary(last: Mapping[tuple[str, str], Record], metric: str) -> str:
    """The comparison in words: the federated model against the atlas, and single hospitals elsewhere.

    Args:
        last: evaluations by model and site.
        metric: larger is better.
    """
    shown = [name for name in ("federated", "pooled", "atlas") if (name, "all") in last]
    lines = ["all patients: " + ", ".join(f"{name} {last[name, 'all'][metric]:.3f}" for name in shown)]
    sites = sorted({site for _, site in last} - {"all"})
    for own in sites:
        elsewhere = [site for site in sites if site != own and (f"local:{own}", site) in last]
        if elsewhere:
            alone = fmean(last[f"local:{own}", site][metric] for site in elsewhere)
            shared = fmean(last["federated", site][metric] for site in elsewhere)
            lines.append(f"at the other hospitals: {own} alone {alone:.3f}, federated {shared:.3f}")
    return "\n".join(lines)
