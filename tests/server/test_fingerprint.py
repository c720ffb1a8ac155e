"""The command on real volumes: the plan it writes is the plan that trains, and wrong sites are named."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml

from conf.console import code
from conf.exits import Exit
from conf.load import compose
from server.cli import app
from server.fingerprint import Found
from server.runfolder import RunFolder
from server.simulate import simulate

PER_SITE = 8


def hospitals(source: Path, root: Path, change: dict[str, str]) -> None:
    """A few real volumes of each suggested site; `change` spoils those of a site."""
    with (source / "manifest.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["suggested_split"] == "train"]
    kept = [row for site in "ABC" for row in [r for r in rows if r["suggested_site"] == site][:PER_SITE]]
    (root / "image").mkdir(parents=True)
    (root / "label").mkdir()
    for row in kept:
        kind = change.get(row["suggested_site"])
        for part in ("image", "label"):
            loaded: Any = nib.load(source / row[part])
            values, affine = np.asarray(loaded.dataobj), np.array(loaded.affine)
            if kind == "scale" and part == "image":
                values = values.astype(np.float32) * 1000 + 1024
            if kind == "spacing":
                affine[:3] /= 10
            nib.Nifti1Image(values, affine).to_filename(root / row[part])  # type: ignore[no-untyped-call]
    with (root / "manifest.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(kept[0]))
        table.writeheader()
        table.writerows(kept)


def overrides(ram: Path, *more: str) -> list[str]:
    return [
        "+experiment=hippocampus",
        f"data.root={ram / 'data'}",
        f"data.cache={ram / 'cache'}",
        "runtime.workers=1",
        *more,
    ]


@pytest.mark.parametrize("change", [{}, {"A": "scale", "C": "spacing"}])
def test_wrong_sites_are_named_and_clean_ones_are_not(
    change: dict[str, str], ram: Path, real: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    hospitals(real("msd_hippocampus"), ram / "data", change)
    run = ram / "run"
    assert code(app, ["fingerprint", *overrides(ram, f"run.dir={run}")]) == Exit.OK
    said = capsys.readouterr().out
    tree = json.loads((run / "fingerprint.json").read_text())
    kinds = {(one["site"], one["kind"]) for one in tree["findings"]}
    assert kinds == ({("A", "intensity"), ("C", "spacing")} if change else set())
    assert ("Nothing looks wrong at A, B, C." in said) == (not change)
    assert "Nothing looks wrong" in (run / "sites.txt").read_text()
    assert (run / "sites.html").read_text().startswith("<!DOCTYPE html>")
    plan = yaml.safe_load((run / "experiment" / "auto.yaml").read_text())
    assert plan["task"]["patch"] == [32, 48, 32]
    assert plan["task"]["spacing"] == [1.0, 1.0, 1.0]
    assert all(one["reason"] for one in tree["rules"])
    # whole cells and patients, no path, no key
    text = (run / "fingerprint.json").read_text()
    assert "hippocampus_" not in text
    assert str(ram) not in text
    merged = sum(tree["merged"]["axes"][0].values())
    assert merged == sum(sum(one["axes"][0].values()) for one in tree["sites"].values())
    # the same again, later
    assert code(app, ["report", str(run)]) == Exit.OK
    assert capsys.readouterr().out == said
    assert (run / "fingerprint.json").read_text() == text


def test_auto_trains_with_the_plan_that_came_out_and_the_command_line_wins(
    ram: Path, real: Callable[[str], Path]
) -> None:
    hospitals(real("msd_hippocampus"), ram / "data", {})
    few = ["federation.rounds=1", "local.steps=1", "baselines=[]", "data.plan=auto", "local.batch_size=1"]
    run = simulate(compose([*overrides(ram, *few), f"run.dir={ram / 'run'}", "task.patch=[24,24,24]"]))
    plan = json.loads((run / "plan.json").read_text())
    assert plan["task"]["patch"] == [24, 24, 24]
    assert plan["task"]["spacing"] == [1.0, 1.0, 1.0]
    assert plan["task"]["flips"] == [0]
    assert plan["model"]["pools"] == [2, 2, 2]
    assert plan["local"]["batch_size"] == 1
    assert RunFolder.open(run).settings.pinned == tuple(
        sorted([*(o.split("=")[0] for o in few[:2]), "local.batch_size", "task.patch"])
    )
    again = Found.read(run / "fingerprint", RunFolder.open(run).settings)
    assert json.loads(again.plan.canonical()) == plan
    assert (run / "metrics.jsonl").exists()
    assert "Nothing looks wrong" in (run / "fingerprint" / "sites.txt").read_text()


def test_settings_are_refused_before_anything_is_written(
    ram: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, exit in (
        (["data.root=nowhere"], Exit.NO_DATA_ROOT),
        ([f"data.root={ram}", "task.patch=[3,3,3]"], Exit.CONFIG),
        ([f"data.root={ram}", "data.memory_gb=0"], Exit.CONFIG),
        ([f"data.root={ram}", "data.plan=maybe"], Exit.CONFIG),
        ([f"data.root={ram}", "strategy=fingerprint"], Exit.UNKNOWN_NAME),
    ):
        assert code(app, ["fingerprint", *argv, f"run.dir={ram / 'run'}"]) == exit
        assert capsys.readouterr().err.startswith("error: ")
    assert not (ram / "run").exists()


def test_a_run_that_is_no_fingerprint_says_so(ram: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (ram / "plan.json").write_text('{"strategy": {"name": "fingerprint"}}')
    assert code(app, ["report", str(ram)]) == Exit.NO_RUN
    assert "not a run directory" in capsys.readouterr().err


def test_a_question_is_no_training_run(ram: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["simulate", f"data.root={ram}", "strategy.name=fingerprint", f"run.dir={ram / 'run'}"]
    assert code(app, argv) == Exit.CONFIG
    assert "use: wardround fingerprint" in capsys.readouterr().err
