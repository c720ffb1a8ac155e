"""`wardround` as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import server.simulate
from conf.console import code
from conf.exits import Exit, Stop
from conf.schema import Settings
from server.cli import app
from server.demo import demo, summary

WARDROUND = [sys.executable, "-c", "from server.cli import main; main()"]
PROJECT = Path(__file__).parents[2]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def finished(folder: Path) -> Path:
    folder.mkdir(parents=True)
    line = {"round": 1, "split": "test", "model": "federated", "site": "all", "patients": 3, "dice_mean": 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return folder


def test_help_is_fast_and_loads_nothing_heavy(empty: Path) -> None:
    script = (
        "import sys; from server.cli import main\n"
        "try: main()\n"
        "finally: sys.stderr.write(' '.join(sys.modules))"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script, "--help"],
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    took = time.monotonic() - began
    assert done.returncode == 0
    for word in ("simulate", "resume", "report", "demo", "Exit codes", "12  federation.rounds"):
        assert word in done.stdout
    assert {"torch", "monai", "hydra", "matplotlib"}.isdisjoint(done.stderr.split())
    assert took < 5  # generous: 0.1 s on an idle machine


@pytest.mark.parametrize(
    ("argv", "exit", "part"),
    [
        (["simulate"], Exit.CONFIG, "data.root is missing"),
        (["simulate", "data.root=x", "federation.rounds=0"], Exit.NO_ROUNDS, "federation.rounds is 0"),
        (["simulate", "data.root=x", "strategy=fedsgd"], Exit.UNKNOWN_NAME, "known: cyclic"),
        (["simulate", "data.root=x", "+loss.name=x"], Exit.CONFIG, "loss.name"),
        (["simulate", "--nonsense"], Exit.USAGE, "--nonsense"),
        (["simulate", "-m", "data.root=x", "local.lr=1,-1"], Exit.CONFIG, "local.lr is -1"),
        (["simulate", "data.root=nowhere"], Exit.NO_DATA_ROOT, "nowhere"),
        (["simulate", "data.root=x", "strategy.name=fedsgd"], Exit.UNKNOWN_NAME, "fedsgd"),
        (["simulate", "data.root=x", "task.name=detection"], Exit.UNKNOWN_NAME, "detection"),
        (["simulate", "data.root=x", "model.name=resnot"], Exit.UNKNOWN_NAME, "resnot"),
        (["simulate", "data.root=x", "loss.name=hinges"], Exit.UNKNOWN_NAME, "hinges"),
        (["simulate", "data.root=x", "strategy=fedprox", "strategy.mu=-1"], Exit.CONFIG, "strategy.mu"),
        (["simulate", "data.root=x", "model.channels=[0,1]"], Exit.CONFIG, "model.channels"),
        (["report", "nowhere"], Exit.NO_RUN, "nowhere"),
        (["resume", "nowhere"], Exit.NO_RUN, "nowhere"),
        (["export", "nowhere", "--format", "pt2", "--out", "x.pt2"], Exit.NO_RUN, "nowhere"),
        (["export", "x", "--format", "pt3", "--out", "x.pt3"], Exit.UNKNOWN_NAME, "known: pt2, safetensors"),
        (["dance"], Exit.USAGE, "dance"),
    ],
)
def test_a_mistake_ends_with_its_code_one_line_and_nothing_written(
    empty: Path, argv: list[str], exit: Exit, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code(app, argv) == exit
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert part in said
    assert list(empty.iterdir()) == []


def test_a_run_directory_that_exists_is_kept(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished(empty / "mine")
    assert code(app, ["simulate", "data.root=x", "run.dir=mine"]) == Exit.RUN_EXISTS
    assert "wardround resume" in capsys.readouterr().err


def test_simulate_runs_every_job_and_prints_its_table(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(settings: Settings) -> Path:
        assert settings.run.dir is not None
        return finished(Path(settings.run.dir))

    monkeypatch.setattr(server.simulate, "simulate", fake)
    assert code(app, ["simulate", "-m", "data.root=x", "run.dir=out", "seed=1,2"]) == Exit.OK
    assert sorted(path.name for path in empty.iterdir()) == ["out-0", "out-1"]
    assert capsys.readouterr().out.count("federated") == 2


def test_a_failing_job_of_a_sweep_ends_it_with_its_code(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(settings: Settings) -> Path:
        raise Stop(Exit.TOO_FEW_REPLIES, "nobody answered")

    monkeypatch.setattr(server.simulate, "simulate", fake)
    assert code(app, ["simulate", "-m", "data.root=x", "seed=1,2"]) == Exit.TOO_FEW_REPLIES


def test_report_and_resume_print_the_table(
    empty: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished(empty / "mine")
    monkeypatch.setattr(server.simulate, "resume", lambda folder: folder)
    for argv in (["report", "mine"], ["resume", "mine"]):
        assert code(app, argv) == Exit.OK
        assert "0.500" in capsys.readouterr().out
    assert code(app, ["report", str(run), "--markdown", "--metric", "patients"]) == Exit.OK
    assert "| federated | 3.000 |" in capsys.readouterr().out


def test_cfg_job_passes_through(empty: Path) -> None:
    done = subprocess.run(
        [*WARDROUND, "simulate", "--cfg", "job", "--package", "strategy", "strategy=fedprox"],
        env={"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout.split() == ["#", "@package", "strategy", "name:", "fedprox", "mu:", "0.01"]
    assert list(empty.iterdir()) == []


def test_a_demo_folder_that_exists_is_kept(empty: Path) -> None:
    (empty / "mine").mkdir()
    with pytest.raises(Stop, match=r"mine exists; .*--out") as caught:
        demo(empty / "mine")
    assert caught.value.exit == Exit.RUN_EXISTS
    assert list((empty / "mine").iterdir()) == []


def test_the_demos_words_compare_single_hospitals_elsewhere() -> None:
    values = {
        ("federated", "a"): 0.8,
        ("federated", "b"): 0.6,
        ("federated", "c"): 0.4,
        ("federated", "all"): 0.6,
        ("atlas", "all"): 0.2,
        ("local:a", "a"): 0.9,
        ("local:a", "b"): 0.1,
        ("local:a", "c"): 0.3,
    }
    said = summary({key: {"dice_mean": value} for key, value in values.items()}, "dice_mean")
    assert said.splitlines() == [
        "all patients: federated 0.600, atlas 0.200",
        "at the other hospitals: a alone 0.200, federated 0.500",
    ]
