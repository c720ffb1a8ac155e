"""Examples for a run's picture: at each site, one patient that the model did not train on."""

from __future__ import annotations

from pathlib import Path

import torch

from server.predict import at_home, says_of
from server.runfolder import RunFolder
from server.simulate import Federation
from strategies.base import Study
from tasks.base import Case, Prediction


def examples(run: Path) -> list[tuple[str, Case, Prediction]]:
    """Each site's first test case (else validation case) and the federated model's prediction of it.

    None where a part of the model stayed at each site.

    Raises:
        Stop: the run, its newest checkpoint or its data cannot be read.
    """
    folder = RunFolder.open(run)
    study = Study.of(folder.settings.plan)
    if at_home(study):
        return []
    says = says_of(folder.path, study)
    federation = Federation.of(folder.settings.data, folder.settings.plan)
    shown = []
    with torch.no_grad():
        for site, splits in federation.sites.items():
            for entry in (splits["test"] or splits["val"])[:1]:
                case = federation.cache.load(entry)
                if case.images:
                    shown.append((site, case, says(case)))
    return shown
