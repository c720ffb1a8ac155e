"""Ray actors: the bytes of an exchange in one process, for any number of actors, and when one is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import torch

from client.train import Bench
from conf.schema import Runtime
from server.cluster import cluster
from server.exchange.virtual import VirtualExchange
from server.rounds import Run
from strategies import STRATEGIES
from strategies.code import code_digest
from tests.federation.actors import Hospitals
from tests.toys import Toys, toy_cases, toy_plan

if TYPE_CHECKING:
    from server.exchange.ray import Actors

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


@dataclass(frozen=True)
class Crew:
    """Actors that do one run after the other: each start brings torch anew."""

    folder: Path
    actors: Actors

    def trained(self, made: Toys, deadly: int = 0) -> dict[str, bytes]:
        """Train over the actors, `site_3` ending its own as often as said; how the run ended."""
        run_id = made.folder.name
        if deadly:
            (self.folder / "marks" / f"{run_id}-{deadly}").mkdir(parents=True)
        torch.set_num_threads(1)
        exchange = VirtualExchange(self.actors, blobs=made.folder / "blobs", seed=made.plan.seed)
        study, strategy = Bench("cpu").study(made.plan)
        Run(study, strategy, list(made.cases), exchange, made.folder, run_id, code_digest()).train()
        return made.ending()

    def deaths(self, run_id: str) -> int:
        return len(list((self.folder / "marks").glob(f"{run_id}-*/*")))


@pytest.fixture(scope="module")
def crew(request: pytest.FixtureRequest, ray: None, module_ram: Path) -> Iterator[Crew]:
    from server.exchange.ray import Actors, RayExchange

    folder = module_ram / f"{request.param} actors"
    hospitals = Hospitals(folder, toy_cases(sites=5, patients=2))
    with RayExchange(hospitals, request.param, blobs=folder / "blobs", seed=0) as exchange:
        assert isinstance(exchange.carrier, Actors)
        yield Crew(folder, exchange.carrier)


def toys(folder: Path, strategy: str) -> Toys:
    plan = toy_plan(strategy, local={"steps": 2})
    return Toys(folder, plan, toy_cases(sites=5, patients=2))


SOME = ("fedavg", "scaffold", "median")


@pytest.mark.parametrize(
    ("crew", "strategy"),
    [(2, strategy) for strategy in STRATEGIES] + [(count, strategy) for count in (1, 4) for strategy in SOME],
    indirect=["crew"],
)
def test_the_bytes_of_one_process(crew: Crew, strategy: str, ram: Path) -> None:
    whole = toys(ram / "whole", strategy)
    whole.train()
    assert crew.trained(toys(ram / strategy, strategy)) == whole.ending()


@pytest.mark.parametrize("crew", [2], indirect=True)
@pytest.mark.parametrize("strategy", SOME)
def test_a_killed_actor_changes_nothing(strategy: str, crew: Crew, ram: Path) -> None:
    whole = toys(ram / "whole", strategy)
    whole.train()
    assert crew.trained(toys(ram / f"killed-{strategy}", strategy), deadly=1) == whole.ending()
    assert crew.deaths(f"killed-{strategy}") == 1


@pytest.mark.parametrize("crew", [2], indirect=True)
def test_a_site_that_kills_twice_is_lost_and_the_others_go_on(crew: Crew, ram: Path) -> None:
    crew.trained(toys(ram / "twice", "fedavg"), deadly=2)
    journal = (ram / "twice" / "journal.jsonl").read_text()
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
    """What a driver leaves that is killed first: Ray takes a while to notice, meanwhile the tests run."""
    script = (
        "import time\nfrom conf.schema import Runtime\nfrom server.cluster import cluster\n"
        "with cluster(Runtime(name='ray', workers=1)):\n    print('up', flush=True)\n    time.sleep(120)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        # by default it hopes for a minute that its server comes back
        env={
            **os.environ,
            "PYTHONPATH": str(PROJECT),
            "TMPDIR": "/tmp",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
        },
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
