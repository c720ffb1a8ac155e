"""A whole simulation on pictures made here: layout, equality, refusals; killed as a command, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conf.exits import Exit, Stop
from conf.load import compose
from conf.schema import Settings
from server.simulate import resume, simulate

pytestmark = pytest.mark.federation

ROOT = Path(__file__).parents[2]
SMALL = [
    "data.manifest=manifest.csv",
    "data.columns.site=hospital",
    "data.columns.patient=patient",
    "data.label_map=nonzero",
    "task.patch=[16,16]",
    "model.channels=[4,8]",
    "local.steps=2",
    "federation.rounds=3",
]


def discs(folder: Path, hospitals: int = 2, patients: int = 5) -> Path:
    """Bright discs on noise, masks 0/255: one manifest."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:24, :20]
    lines = ["image,label,patient,hospital"]
    for h in range(hospitals):
        for p in range(patients):
            name = f"h{h}p{p}"
            y, x, r = rng.integers(6, 14), rng.integers(6, 14), rng.integers(3, 6)
            mask = (rows - y) ** 2 + (columns - x) ** 2 <= r * r
            image = np.clip(rng.normal(60 + 20 * h, 15, mask.shape) + 90 * mask, 0, 255)
            for kind, array in (("image", image), ("label", 255 * mask)):
                (folder / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(folder / kind / f"{name}.png")
            lines.append(f"image/{name}.png,label/{name}.png,{name},h{h}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def settings(folder: Path, *overrides: str) -> Settings:
    where = [f"data.root={folder / 'data'}", f"data.cache={folder / 'cache'}", f"run.dir={folder / 'run'}"]
    return compose([*where, *SMALL, *overrides])


def shared(run: Path) -> dict[str, bytes]:
    """What two equal runs share."""
    files = [run / "plan.json", run / "metrics.jsonl", *sorted(run.glob("checkpoints/*/*"))]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


ALL = "baselines=[trivial,pooled,local]"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run with everything, by one process."""
    folder = tmp_path_factory.mktemp("whole")
    discs(folder / "data")
    return simulate(settings(folder, "runtime.workers=1", ALL))


def test_what_stands_in_a_run(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} >= {
        *("config.yaml", "plan.json", "run.json", "checkpoints"),
        *("metrics.jsonl", "timing.jsonl", "journal.jsonl"),
    }
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    last = {(line["model"], line["site"]) for line in lines if line["round"] == 3 and line["split"] == "test"}
    models = {"federated", "pooled", "local:h0", "local:h1", "constant", "atlas", "threshold", "otsu"}
    assert last == {(model, site) for model in models for site in ("h0", "h1", "all")}
    identity = json.loads((whole / "run.json").read_text())["id"]
    assert not any(identity.encode() in blob for blob in shared(whole).values())
    assert not any(str(whole.parent).encode() in blob for blob in shared(whole).values())


@pytest.mark.parametrize("workers", [2, 3] if os.environ.get("WARDROUND_CHAOS") else [3])
def test_equal_for_any_number_of_workers(workers: int, whole: Path, tmp_path: Path) -> None:
    discs(tmp_path / "data")
    run = simulate(settings(tmp_path, f"runtime.workers={workers}", ALL))
    assert shared(run) == shared(whole)


@pytest.mark.parametrize("seconds", [0.2, 0.8, 2.0] if os.environ.get("WARDROUND_CHAOS") else [0.6])
def test_killed_and_resumed(seconds: float, whole: Path, tmp_path: Path) -> None:
    """SIGKILL of the whole process group, some time after the run directory appeared."""
    discs(tmp_path / "data")
    where = [f"data.root={tmp_path / 'data'}", f"data.cache={tmp_path / 'cache'}", "run.dir=run"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from server.cli import main; main()", "simulate", *where, *SMALL, ALL],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "run.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run = resume(tmp_path / "run")
    assert shared(run) == shared(whole)
    before = {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")}
    resume(run)  # a finished run is left as it is
    assert {path: path.stat().st_mtime_ns for path in (run / "checkpoints").rglob("*")} == before
    assert shared(run) == shared(whole)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["data.columns.site=null"], 10, "no case names its site"),
        (
            ["data.columns.site=null", "data.sites=11"],
            22,
            "data.sites is 11 for 10 patients; use fewer sites",
        ),
        (["federation.min_replies=3"], 10, "federation.min_replies is 3; there are 2 sites"),
        (["federation.cohort=3"], 10, "federation.cohort is 3; there are 2 sites"),
        (["task.patch=[16,16,16]"], 10, "the plan does not fit the cases of site h0"),
        (["data.label_map={0:0,254:1}"], 20, "label outside the map"),
        (["task.channels=3"], 10, "the plan does not fit the cases of site h0"),
    ],
)
def test_a_mistake_has_a_number_and_leaves_nothing(
    arguments: list[str], code: int, message: str, tmp_path: Path
) -> None:
    discs(tmp_path / "data")
    with pytest.raises(Stop, match=message) as stop:
        simulate(settings(tmp_path, *arguments))
    assert stop.value.exit == code
    assert not (tmp_path / "run").exists()


def test_the_other_cases_run_when_some_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    discs(tmp_path / "data")
    (tmp_path / "data" / "label" / "h0p0.png").unlink()
    (tmp_path / "data" / "image" / "h1p4.png").write_bytes(b"no picture")
    simulate(settings(tmp_path))
    said = capsys.readouterr().err
    assert "refused: image/h0p0.png: image without mask" in said
    assert "refused: image/h1p4.png: unreadable" in said


def test_one_patient_only(tmp_path: Path) -> None:
    discs(tmp_path / "data", hospitals=1, patients=1)
    with pytest.raises(Stop, match="the data hold one patient") as stop:
        simulate(settings(tmp_path))
    assert stop.value.exit == Exit.ONE_PATIENT
