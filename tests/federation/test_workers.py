"""Forked workers: the same bytes for any number of them, and when one is killed at work."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from conf.files import shared_memory, sweep_scratch
from strategies import STRATEGIES
from tests.toys import Fatal, Toys, toy_cases, toy_plan

pytestmark = pytest.mark.federation


def wrapped(folder: Path, strategy: str, times: int, workers: int) -> Toys:
    marks = folder / "marks"
    marks.mkdir(parents=True)
    made = Toys(folder, toy_plan(strategy), toy_cases(sites=5, patients=2), workers=workers)
    return replace(made, wrap=lambda site, name: Fatal(site, marks, times) if name == "site_3" else site)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_worker_changes_nothing(strategy: str, ram: Path) -> None:
    whole = Toys(ram / "whole", toy_plan(strategy), toy_cases(sites=5, patients=2))
    whole.train()
    made = wrapped(ram / "killed", strategy, times=1, workers=2)
    made.train()
    assert made.ending() == whole.ending()


def test_a_site_that_kills_twice_is_lost_and_the_others_go_on(ram: Path) -> None:
    made = wrapped(ram, "fedavg", times=2, workers=2)
    made.train()
    journal = (ram / "journal.jsonl").read_text()
    assert journal.count('"code": "lost_site"') >= 1
    assert '"site": "site_3", "code": "lost_site"' in journal


def test_workers_end_with_the_run_and_leave_no_shared_memory(ram: Path) -> None:
    before = set(psutil.Process().children())
    used = []
    for rounds in (2, 6):
        plan = toy_plan(federation={"rounds": rounds})
        with Toys(ram / f"{rounds}", plan, toy_cases(), workers=3).opened() as run:
            run.train()
            scratch = Path(run.exchange.carrier.slabs.folder)
            used.append(len(list(scratch.iterdir())))
        assert not scratch.exists()
    assert used[0] == used[1]  # files are used again, not made anew
    left = set(psutil.Process().children()) - before
    assert not [child for child in left if child.name() != "resource_tracker"]


def test_workers_end_when_their_parent_is_killed(ram: Path) -> None:
    made = Toys(ram / "a", toy_plan(federation={"rounds": 10_000}), toy_cases(), workers=3)
    pid = os.fork()
    if pid == 0:
        made.train()
        os._exit(0)
    try:
        deadline = time.monotonic() + 20
        children: list[psutil.Process] = []
        while len(children) < 3 and time.monotonic() < deadline:
            children = psutil.Process(pid).children()
            time.sleep(0.02)
        assert len(children) == 3
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    left = list(shared_memory().glob(f"wardround-{pid}-*"))
    sweep_scratch()
    assert not any(path.exists() for path in left)
