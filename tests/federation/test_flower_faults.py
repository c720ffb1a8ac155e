"""Each process is killed once in a round: the run ends with the same bytes, and nobody trains twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.federation.loop import SITES, ToyLoop, locally, toy_loop
from tests.toys import toy_plan

pytestmark = pytest.mark.federation

SLOW = {"sleep": 3.0}


@pytest.fixture(scope="module")
def loop(module_ram: Path) -> Iterator[ToyLoop]:
    with toy_loop(module_ram) as started:
        yield started


@pytest.fixture(autouse=True)
def clean(loop: ToyLoop) -> Iterator[None]:
    loop.orders(r2=SLOW)
    yield
    loop.orders()
    for site in SITES:
        loop.trained(site)


#: what is killed while round 2 is trained, and the trainings of `site_1` until the end
VICTIMS = {
    "agent-site_1": [1, 2],
    "superlink": [1, 2],
    "coordinator": [1, 2],
    "trainer-site_1": [1, 2, 2],  # its own training is lost with it
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_in_a_round(loop: ToyLoop, victim: str, ram: Path) -> None:
    # scaffold: sites have a state that must be settled once, and only once
    plan = toy_plan("scaffold", federation={"rounds": 2})
    name = f"kill-{victim}"
    run = loop.submit(name, plan)
    loop.training("site_1", 2)
    time.sleep(0.5)
    began = time.monotonic()
    loop.kill(victim)
    assert loop.finish(run) == "completed", f"{time.monotonic() - began:.1f} s after the kill"
    assert loop.result(name) == locally(ram, plan)
    assert {site: loop.trained(site) for site in SITES} == {
        site: VICTIMS[victim] if site == "site_1" else [1, 2] for site in SITES
    }
    assert not [entry for entry in loop.journal(name) if "code" in entry]


def test_killed_between_reply_and_fold(loop: ToyLoop, ram: Path) -> None:
    """The coordinator dies when one reply is in and others are not: the kept one is given again."""
    loop.orders(r1={"sleep": 0.0}, r2=SLOW)
    plan = toy_plan(federation={"rounds": 2})
    run = loop.submit("twice", plan)
    for site in SITES:
        loop.training(site, 2)
    log = loop.folder / "log" / "coordinator.log"
    loop.until(
        "an answer of round 2", lambda: log.read_text().rpartition("round 2 of 2: ask")[2].count("answer") > 0
    )
    loop.kill("coordinator")
    assert loop.finish(run) == "completed"
    assert loop.result("twice") == locally(ram, plan)
    assert all(loop.trained(site) == [1, 2] for site in SITES)
