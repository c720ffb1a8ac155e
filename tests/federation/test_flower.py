"""Runs over a real SuperLink, agents, trainers and coordinator: equal bytes, closed doors.

And each of these processes is killed once in a round, last, as the tests before count what they see.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from client.ledger import Ledger
from strategies.privacy.accountant import Entry, merged
from tests.federation.loop import PROJECT, SITES, ToyLoop, locally, toy_loop
from tests.toys import Toys, toy_cases, toy_plan

pytestmark = pytest.mark.federation

CANARY = "/data/CANARY^PATIENT/ct.dcm"


@pytest.fixture(scope="module")
def loop(module_ram: Path) -> Iterator[ToyLoop]:
    with toy_loop(module_ram) as started:
        yield started


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "median"])
def test_same_bytes_as_in_one_process(loop: ToyLoop, strategy: str, ram: Path) -> None:
    plan = toy_plan(strategy, federation={"rounds": 2})
    run = loop.submit(strategy, plan)
    assert loop.finish(run) == "completed"
    assert loop.result(strategy) == locally(ram, plan)
    for site in SITES:
        assert loop.trained(site) == [1, 2]


def test_the_agent_has_no_torch(loop: ToyLoop) -> None:
    for site in SITES:
        maps = Path(f"/proc/{loop.pid(f'agent-{site}')}/maps").read_text()
        assert "python" in maps
        assert "torch" not in maps
    script = "import sys, client.agent, client.app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=PROJECT)


def test_the_trainer_has_a_private_door_and_no_network(loop: ToyLoop) -> None:
    for site in SITES:
        door = loop.socket(site)
        assert oct(door.stat().st_mode & 0o777) == "0o600"
        assert oct(door.parent.stat().st_mode & 0o777) == "0o700"
        trainer = psutil.Process(loop.pid(f"trainer-{site}"))
        assert not trainer.net_connections("inet")
        ours, theirs = (Path(f"/proc/{pid}/ns/net").readlink() for pid in ("self", trainer.pid))
        log = (loop.folder / "log" / f"trainer-{site}.log").read_text()
        assert ours != theirs or "keeps its network" in log


def test_both_sides_show_what_they_count(loop: ToyLoop) -> None:
    def shown(process: str) -> dict[str, float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{loop.metrics[process]}/metrics") as page:
            lines = page.read().decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.split()[-1]) for line in lines if line[0] != "#"}

    here = shown("coordinator")
    # three runs of two rounds: each with a plan, two trainings, two validations, one test
    assert here["wardround_rounds_total"] == 6
    assert here["wardround_replies_total"] == 3 * 3 * 6
    assert sum(value for name, value in here.items() if name.startswith("wardround_failures_total")) == 0
    site = shown("agent-site_1")
    assert site['wardround_site_calls_total{operation="train",status="reply"}'] == 3 * 6
    assert site['wardround_site_work_total{outcome="update",stage="train"}'] == 3 * 2
    assert site['wardround_site_bytes_total{direction="up"}'] > 0
    everywhere = "".join([*here, *site])
    assert not any(name in everywhere for name in (*SITES, "fedavg", "scaffold"))


def test_a_deadline_cancels_a_long_training(loop: ToyLoop) -> None:
    loop.orders(r1={"sleep": 60})
    run = loop.submit("late", toy_plan(federation={"rounds": 1, "round_timeout_s": 8.0}))
    for site in SITES:
        loop.training(site)
    began = time.monotonic()
    cancelled = [loop.folder / "log" / f"trainer-{site}.log" for site in SITES]
    loop.until("the sites' end", lambda: all("train: cancelled" in log.read_text() for log in cancelled))
    assert time.monotonic() - began < 8 + 5
    loop.orders()
    assert loop.finish(run) == "completed"  # the second attempt
    first = [entry for entry in loop.journal("late") if entry["attempt"] == 0 and entry["stage"] == "train"]
    assert [entry["code"] for entry in first if "code" in entry] == ["deadline"] * 3
    for site in SITES:
        loop.trained(site)


def test_only_codes_leave_a_site(loop: ToyLoop) -> None:
    loop.orders(r1={"raise": CANARY})
    run = loop.submit("canary", toy_plan(federation={"rounds": 1}))
    assert loop.finish(run) == "failed: TOO_FEW_REPLIES"
    loop.orders()
    assert {entry["code"] for entry in loop.journal("canary") if "code" in entry} == {"internal"}
    inside: set[Path] = set()
    outside: set[Path] = set()
    for path in loop.folder.rglob("*"):
        if path.is_file() and b"CANARY" in path.read_bytes():
            (inside if "sites" in path.parts else outside).add(path)
    assert {path.name for path in inside} == {"incidents.jsonl"}
    assert not outside
    for site in SITES:
        loop.trained(site)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_a_private_run_charges_what_one_process_charges_and_tells_no_exact_metric(
    sigma: float, loop: ToyLoop, ram: Path
) -> None:
    told = {"metrics": "noised", "metrics_sigma": sigma} if sigma else {}
    plan = toy_plan(
        federation={"rounds": 2, "weight": "equal"},
        privacy={"mode": "dpsgd", "sigma": 1.0, "nominal_patients": 5, **told},
    )
    books = {site: Ledger(loop.folder / "sites" / site / "ledger.jsonl", None) for site in SITES}
    before = {site: len(book.lines()[0]) for site, book in books.items()}
    name = f"private-{sigma:g}"
    assert loop.finish(loop.submit(name, plan)) == "completed"
    Toys(ram, plan, toy_cases()).train()
    # validation after each round, test at the end
    expected = sorted([Entry(1.0, 2 / 5, 2 * 4), *([Entry(sigma, 1.0, 3)] if sigma else [])])
    for site in SITES:
        there = merged(line.entry for line in books[site].lines()[0][before[site] :])
        here = Ledger(ram / "sites" / site / "ledger.jsonl", None).entries()
        assert list(there) == sorted(here) == expected
        loop.trained(site)
    run = loop.folder / "runs" / name
    said = json.loads((run / "privacy.json").read_text())
    charged = [{"sigma": e.sigma, "q": e.q, "steps": e.steps} for e in expected]
    assert said["charged"] == dict.fromkeys(SITES, charged)
    lines, alone = (
        [json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (run, ram)
    )
    assert bool(lines) == bool(sigma)
    # two patients a site; two fields leave, so six deviations of three sites' noise are 6 σ √2 √3
    band = 6 * sigma * 6**0.5
    for line in (*lines, *(alone if sigma else ())):
        assert abs(line["patients"] - (6 if line["site"] == "all" else 2)) <= band + 0.5


# ---- each process is killed once in a round: the same bytes, and nobody trains twice

SLOW = {"sleep": 3.0}


@pytest.fixture
def slow(loop: ToyLoop) -> Iterator[None]:
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


@pytest.mark.usefixtures("slow")
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


@pytest.mark.usefixtures("slow")
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
