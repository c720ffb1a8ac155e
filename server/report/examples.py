"""Examples for a run's picture: at each site, one patient that the model did not train on."""

from __future__ import annotations

from pathlib import Path

import torch

from server.checkpoint import result
from server.runfolder import RunFolder
from server.simulate import Federation
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
    model = task.build_model()
    # integer buffers never travel, so the checkpoint has none
    model.load_state_dict(weights, strict=False)
    model.eval()
    federation = Federation.of(folder.settings.data, plan)
    shown = []
    with torch.no_grad():
        for site, splits in federation.sites.items():
            for entry in (splits["test"] or splits["val"])[:1]:
                case = federation.cache.load(entry)
                shown.append((site, case, task.predict(model, case)))
    return shown
