"""Ray actors: the bytes of an exchange in one process, for any number of actors, and when one is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from conf.schema import Runtime
from server.cluster import cluster
from server.rounds import Run
from strategies import STRATEGIES
from strategies.code import code_digest
from tests.federation.actors import Hospitals
from tests.toys import Toys, toy_cases, toy_plan

pytestmark = [
    pytest.mark.federation,
    # Ray's own: about a variable that it will stop to set, and files that its start leaves to the collector
    pytest.mark.filterwarnings("ignore:Tip. In future versions of Ray:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One start for all tests here: it takes seconds."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    here = Path.cwd()
    with cluster(Runtime(name="ray", workers=4)):
        assert not list(Path.cwd().iterdir())
        mine = [c for c in psutil.Process().children(recursive=True) if c.pid not in before]
        assert mine
        yield
    assert Path.cwd() == here
    _, alive = psutil.wait_procs(mine, timeout=20)
    assert not alive


def trained(made: Toys, workers: int, times: int = 0) -> dict[str, bytes]:
    """Train over actors; how it ended."""
    from server.exchange.ray import RayExchange

    torch.set_num_threads(1)
    (made.folder / "marks").mkdir(parents=True)
    hospitals = Hospitals(made.folder, made.plan, made.cases, times)
    with RayExchange(hospitals, workers, blobs=made.folder / "blobs", seed=made.plan.seed) as exchange:
        study, strategy = hospitals.bench.study(made.plan)
        sites = list(made.cases)
        hospitals.__dict__.pop("bench")
        Run(study, strategy, sites, exchange, made.folder, "run", code_digest()).train()
    return made.ending()


def toys(folder: Path, strategy: str, rounds: int = 3) -> Toys:
    plan = toy_plan(strategy, federation={"rounds": rounds}, local={"steps": 2})
    return Toys(folder, plan, toy_cases(sites=5, patients=2))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_bytes_of_one_process(strategy: str, ray: None, ram: Path) -> None:
    whole = toys(ram / "whole", strategy)
    whole.train()
    counts = (1, 2, 4) if strategy in ("fedavg", "scaffold", "median") else (2,)
    for workers in counts:
        assert trained(toys(ram / str(workers), strategy), workers) == whole.ending(), workers


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "median"])
def test_a_killed_actor_changes_nothing(strategy: str, ray: None, ram: Path) -> None:
    whole = toys(ram / "whole", strategy)
    whole.train()
    assert trained(toys(ram / "killed", strategy), workers=2, times=1) == whole.ending()
    assert len(list((ram / "killed" / "marks").iterdir())) == 1


def test_a_site_that_kills_twice_is_lost_and_the_others_go_on(ray: None, ram: Path) -> None:
    trained(toys(ram / "run", "fedavg"), workers=2, times=2)
    journal = (ram / "run" / "journal.jsonl").read_text()
    assert '"site": "site_3", "code": "lost_site"' in journal


def test_a_cluster_that_does_not_answer_is_one_line() -> None:
    script = (
        "from conf.schema import Runtime\nfrom server.cluster import cluster\n"
        "with cluster(Runtime(name='ray', ray_address='127.0.0.1:1')): pass"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PROJECT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode
    assert "runtime.ray_address is '127.0.0.1:1'; no cluster answers there" in done.stderr


@pytest.fixture(scope="module", autouse=True)
def orphans() -> list[psutil.Process]:
    """What a driver leaves that is killed first: Ray takes a minute to notice, meanwhile the tests run."""
    script = (
        "import time\nfrom conf.schema import Runtime\nfrom server.cluster import cluster\n"
        "with cluster(Runtime(name='ray', workers=1)):\n    print('up', flush=True)\n    time.sleep(120)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(PROJECT), "TMPDIR": "/tmp"},
        stdout=subprocess.PIPE,
        text=True,
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "up\n"
        started = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    return started


def test_a_killed_driver_leaves_no_process(orphans: list[psutil.Process]) -> None:
    assert orphans
    deadline = time.monotonic() + 90
    while (alive := [p for p in orphans if p.is_running()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive
