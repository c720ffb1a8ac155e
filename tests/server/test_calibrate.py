"""A run's temperature, from its folder to its predictions."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.exits import Exit, Stop
from conf.load import compose
from server.calibrate import calibrate
from server.predict import TEMPERATURE, predict
from server.simulate import simulate

TINY = [
    "task=classification",
    "model=linear",
    "task.features={name: thumbnail, side: 2}",
    "task.size=[32,32]",
]
SHORT = ["federation.rounds=2", "local.steps=30", "local.lr=0.5", "runtime=local", "runtime.workers=1"]


def run(folder: Path, *overrides: str) -> Path:
    """A simulated run over two sites of pictures, bright ones mostly positive, its network too certain."""
    draw = np.random.default_rng(0)
    rows = []
    for i in range(80):
        bright = draw.normal()
        picture = np.clip(128 + 60 * bright + draw.normal(size=(8, 8)), 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i}.png")
        rows.append((f"{i}.png", int(bright + draw.normal() > 0), i, "ab"[i % 2]))
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label", "patient", "site"), *rows])
    data = [
        "data=manifest",
        "data.columns.patient=patient",
        "data.columns.site=site",
        "data.val_fraction=0.4",
    ]
    given = [f"data.root={folder}", f"data.cache={folder}-cache", f"run.dir={folder}-run", "baselines=[]"]
    scale = ["task.normalise=fixed", "task.clip=[0,255]", "task.mean=128", "task.deviation=30"]
    return simulate(compose([*TINY, *SHORT, *data, *given, *scale, *overrides]))


def test_a_temperature_is_fitted_scored_and_used(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    path = run(tmp_path / "x")
    predict(path, tmp_path / "x" / "3.png", tmp_path / "before")
    temperature, lines = calibrate(path)
    assert temperature > 1.2
    assert json.loads((path / TEMPERATURE).read_text()) == {"temperature": temperature}
    found = {(x["model"], x["split"]): x for x in lines}
    for metric in ("auroc", "accuracy"):
        assert found["calibrated", "test"][metric] == found["federated", "test"][metric]
    assert found["calibrated", "val"]["ece"] < found["federated", "val"]["ece"]
    before = (path / "metrics.jsonl").read_bytes()
    assert calibrate(path)[0] == temperature
    assert (path / "metrics.jsonl").read_bytes() == before

    predict(path, tmp_path / "x" / "3.png", tmp_path / "after")
    odds = []
    for out in ("before", "after"):
        p0, p1 = (
            float(r["value"])
            for r in csv.DictReader((tmp_path / out / "scores.csv").read_text().splitlines())
        )
        odds.append(math.log(p1 / p0))
    assert odds[0] / odds[1] == pytest.approx(temperature, rel=1e-5)


def test_a_private_run_is_left_alone(tmp_path: Path) -> None:
    from server.runfolder import RunFolder

    private = ["privacy=dpsgd", "privacy.sigma=1", "privacy.epsilon=0", "privacy.nominal_patients=50"]
    settings = compose([*TINY, *private, "local.batch_size=8", "federation.weight=equal", "data.root=."])
    RunFolder.create(tmp_path / "run", settings)
    with pytest.raises(Stop, match=r"was private; a temperature is made of exact sums") as stop:
        calibrate(tmp_path / "run")
    assert stop.value.exit is Exit.CONFIG
