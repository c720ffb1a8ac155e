"""A finished run's temperature: fitted by its sites' validation patients, kept in the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

from conf.exits import Exit, Stop
from conf.files import no_space, write_atomic
from server.checkpoint import result
from server.cluster import cluster
from server.evaluate import Line
from server.predict import TEMPERATURE
from server.runfolder import RunFolder
from server.simulate import Federation, Simulation
from server.sums import fitted
from tasks.temperature import MODEL

MODEL_NAME = "calibrated"
_SHOWN = ("ece", "brier", "accuracy")


def calibrate(run: Path) -> tuple[float, list[Line]]:
    """Fit a simulated run's temperature and score it, as model `calibrated`, in `metrics.jsonl`.

    Returns:
        The temperature, and the lines of the federated and the calibrated model over all sites.

    Raises:
        Stop: (`CONFIG`, `NO_RUN`) it cannot be had; (`SITE_REFUSED`) no site tells its sums.
    """
    folder = RunFolder.open(run.absolute())
    plan = folder.settings.plan
    if plan.privacy.mode != "none":
        raise Stop(
            Exit.CONFIG,
            f"{run} was private; a temperature is made of exact sums over validation patients, which no "
            "noise covers: calibrate on public data, or not at all",
        )
    weights = result(folder.path)
    federation = Federation.of(folder.settings.data, plan)
    with cluster(folder.settings.runtime), Simulation(folder, federation).opened() as loop:
        if not (loop.strategy.whole and MODEL_NAME in loop.study.task.sums()):
            raise Stop(Exit.CONFIG, f"{run} has no one model that gives probabilities of classes")
        found = fitted(loop, MODEL_NAME, {MODEL + name: tensor for name, tensor in weights.items()})
        if not found:
            raise Stop(Exit.SITE_REFUSED, f"no site of {run} has validation patients whose sums may leave")
        value = math.exp(float(found["log_t"]))
        with no_space(folder.path / TEMPERATURE, "wardround calibrate"):
            write_atomic(folder.path / TEMPERATURE, json.dumps({"temperature": value}).encode())
        if not loop.metrics.has(loop.progress.round, MODEL_NAME):
            down = {"kind": "trivial", "name": MODEL_NAME, "known": found}
            loop.metrics.add([x for split in ("val", "test") for x in loop.score(MODEL_NAME, down, split)])
        return value, [x for x in loop.metrics.of("federated", MODEL_NAME) if x["site"] == "all"]


def show(temperature: float, lines: list[Line]) -> None:
    """Print the temperature, and calibration on test patients without and with it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "model", *_SHOWN, title=f"temperature {temperature:.4f}; test patients", title_justify="left"
    )
    for line in lines:
        if line["split"] == "test":
            table.add_row(line["model"], *(f"{line.get(name, math.nan):.4f}" for name in _SHOWN))
    Console().print(table)
