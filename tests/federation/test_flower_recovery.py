"""A task that Flower has lost is taken up again by itself; a run that was stopped is stopped at its sites."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.runfolder import RunFolder
from tests.federation.loop import SITES, ToyLoop, locally
from tests.federation.short_superlink import LEASE_S
from tests.toys import Toys, toy_cases, toy_plan

pytestmark = pytest.mark.federation


class ShortLoop(ToyLoop):
    """Tasks are lost after a few seconds' silence."""

    def superlink(self) -> list[str]:
        return [sys.executable, "-m", "tests.federation.short_superlink", *super().superlink()[1:]]

    def said(self, name: str) -> str:
        return RunFolder.open(self.folder / "runs" / name).said

    def ending(self, name: str) -> str:
        """Wait for the end of a run directory, whichever Flower run brings it."""
        self.until(f"the end of {name}", lambda: bool(self.said(name)), 90, 0.2)
        return self.said(name)


@pytest.fixture(scope="module")
def loop(module_ram: Path) -> Iterator[ShortLoop]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WARDROUND_SHORT_LEASE", "1")
        with ShortLoop(module_ram / "loop") as started:
            try:
                yield started
            finally:
                print(started.logs())


@pytest.fixture(autouse=True)
def clean(loop: ShortLoop) -> Iterator[None]:
    yield
    loop.orders()
    for site in SITES:
        loop.trained(site)


# `token`: claimed, not yet known to the disk; `run`: SuperLink counts the task as running already
@pytest.mark.parametrize("at", ["token", "run"])
def test_killed_before_the_token_is_kept(loop: ShortLoop, at: str, ram: Path) -> None:
    (loop.folder / "die.json").write_text(json.dumps(at))
    plan = toy_plan(federation={"rounds": 1})
    name = f"token-{at}"
    loop.submit(name, plan)
    identity = RunFolder.open(loop.folder / "runs" / name).id
    assert loop.ending(name) == "completed"
    assert not (loop.folder / "die.json").exists()
    assert RunFolder.open(loop.folder / "runs" / name).id == identity
    assert loop.result(name) == locally(ram, plan)
    assert all(loop.trained(site) == [1] for site in SITES)


def test_away_longer_than_the_lease(loop: ShortLoop, ram: Path) -> None:
    loop.orders(r2={"sleep": 3.0})
    plan = toy_plan("scaffold", federation={"rounds": 2})
    run = loop.submit("away", plan)
    for site in SITES:
        loop.training(site, 2)
    coordinator = loop.pid("coordinator")
    os.kill(coordinator, signal.SIGSTOP)
    with loop.control() as superlink:
        loop.until("the lease's end", lambda: superlink.status(run)[0] == "finished", 3 * LEASE_S, 0.3)
    os.kill(coordinator, signal.SIGCONT)
    assert loop.ending("away") == "completed"
    assert loop.result("away") == locally(ram, plan)
    assert all(loop.trained(site) == [1, 2] for site in SITES)


def test_a_stop_at_superlink_ends_the_trainings(loop: ShortLoop) -> None:
    loop.orders(r1={"sleep": 60})
    logs = [loop.folder / "log" / f"trainer-{site}.log" for site in SITES]
    run = loop.submit("stopped", toy_plan(federation={"rounds": 1}))
    for site in SITES:
        loop.training(site)
    with loop.control() as superlink:
        superlink.stop(run)
    loop.until("the trainings' end", lambda: all("cancelled" in log.read_text() for log in logs), 15)
    assert loop.ending("stopped") == "stopped"
    with loop.control() as superlink:
        assert [entry.cancels for entry in superlink.runs() if entry.name == "stopped"] == [False, True]


def test_the_trivial_row_comes_by_sums_over_the_sites(loop: ShortLoop, ram: Path) -> None:
    plan = toy_plan(federation={"rounds": 1})
    loop.submit("trivial", plan, ("trivial",))
    assert loop.ending("trivial") == "completed"
    with Toys(ram, plan, toy_cases()).opened() as run:
        run.train()
        run.metrics.add(run.trivial("constant", ("val", "test")))
    assert (loop.folder / "runs" / "trivial" / "metrics.jsonl").read_bytes() == (
        ram / "metrics.jsonl"
    ).read_bytes()


def test_a_second_coordinator_is_refused_in_one_line(loop: ShortLoop) -> None:
    import subprocess

    command = [*loop.coordinator()[:-2], "--metrics", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path.cwd(), timeout=60)
    assert done.returncode == 43
    assert done.stderr.splitlines()[-1].startswith("error: another coordinator works in")
    assert "Traceback" not in done.stderr
