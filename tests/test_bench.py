"""The benchmarks' own logic; nothing is timed here."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PROJECT = Path(__file__).parents[1]


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=PROJECT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("value", "limit", "kind", "mark"),
    [
        (3.0, 3.0, "most", "met"),
        (3.1, 3.0, "most", "NOT MET"),
        (3.0, 3.0, "least", "met"),
        (2.9, 3.0, "least", "NOT MET"),
        (float("nan"), 3.0, "least", "NOT MET"),
        (float("nan"), 3.0, "most", "NOT MET"),
        (1e9, None, "most", ""),
    ],
)
def test_a_row_is_held_against_its_limit(
    value: float,
    limit: float | None,
    kind: str,
    mark: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    row: Any = runpy.run_path(str(PROJECT / "bench" / "row.py"))["row"]
    monkeypatch.setenv("BENCH_ROWS", str(tmp_path / "rows"))
    assert row("what", value, "s", limit, kind) == (mark != "NOT MET")
    assert json.loads((tmp_path / "rows").read_text())["met"] == mark
    assert capsys.readouterr().out.count("\n") == 1


def test_without_a_gpu_its_benchmark_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run("bench/gpu.py")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stdout.startswith("no CUDA device here")


def test_an_unknown_part_lists_the_known_ones() -> None:
    done = run("-m", "bench", "fold", "speed")
    assert done.returncode == 1
    known = "fold, commands, ingest, ledger, scaling, engine, deployed, dp, audit, gpu"
    assert done.stderr == f"no part 'speed'; known: {known}\n"
