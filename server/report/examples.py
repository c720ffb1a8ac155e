"""Examples for a run's picture: at each site, one patient that the model did not train on."""

from __future__ import annotations

from pathlib import Path

import torch

from server.checkpoint import result
from server.runfolder import RunFolder
from server.simulate import Federation
from strategies import build_strategy
from tasks.base import Case, Prediction, build_task


def examples(run: Path) -> list[tuple[str, Case, Prediction]]:
    """Each site's first test case (else validation case) and the federated model's prediction of it.

    Raises:
        Stop: the run, its newest checkpoint or its data cannot be read.
    """
    folder = RunFolder.open(run)
    plan = folder.settings.plan
    weights = result(run)
    task = build_task(plan)
    says = build_strategy(plan).says(task, weights)
    federation = Federation.of(folder.settings.data, plan)
    shown = []
    with torch.no_grad():
        for site, splits in federation.sites.items():
            for entry in (splits["test"] or splits["val"])[:1]:
                case = federation.cache.load(entry)
                shown.append((site, case, says(case)))
    return shown
