"""Folds through the command, as a researcher types them: a sweep, then the comparison."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conf.exits import Exit
from server.cli import app
from tests.federation.test_simulate import SMALL, discs

pytestmark = pytest.mark.federation


def test_a_sweep_over_folds_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from conf.console import code

    discs(tmp_path / "data", patients=6)
    where = [
        f"data.root={tmp_path / 'data'}",
        f"data.cache={tmp_path / 'cache'}",
        f"run.dir={tmp_path / 'cv'}",
    ]
    folds = ["data.folds=2", "data.fold=0,1", "baselines=[trivial]", "federation.rounds=1"]
    assert code(app, ["simulate", "-m", *where, *SMALL, "runtime.workers=1", *folds]) == Exit.OK
    runs = [str(tmp_path / f"cv-{k}") for k in range(2)]
    capsys.readouterr()
    assert code(app, ["compare", *runs, "--json"]) == Exit.OK
    made = json.loads(capsys.readouterr().out)
    models = {row["model"]: row for row in made["models"]}
    assert models.keys() == {"federated", "constant", "atlas", "threshold", "otsu"}
    assert all(row["patients"] == 12 for row in models.values())  # each patient once
    assert [gap["minus"] for gap in made["differences"]] == ["atlas", "constant", "otsu", "threshold"]
    assert {gap["method"] for gap in made["differences"]} == {"bootstrap"}
    assert all(gap["lo"] is not None for gap in made["differences"])
    assert not any("missing" in note for note in made["notes"])
