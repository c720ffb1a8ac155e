"""Killed anywhere, resumed: the same bytes as an undisturbed run. Real processes, real SIGKILL."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from conf.exits import Stop
from server.checkpoint import latest
from server.exchange import Handler
from strategies import STRATEGIES
from strategies.protocol import Failure, Instruction, Reply, Tree
from tests.toys import Toys, toy_cases, toy_plan

pytestmark = pytest.mark.federation

FORK = multiprocessing.get_context("fork")
EVERY = 1 if os.environ.get("WARDROUND_CHAOS") else 4
"""`make chaos` kills at every event, `make test` at a sample."""


def toys(folder: Path, strategy: str, **changes: object) -> Toys:
    task = "tiny_net" if strategy == "fedbn" else "quadratic"
    plan = toy_plan(strategy, task=task, local={"steps": 2}, federation={"min_replies": 1})
    made = Toys(folder, plan, toy_cases(patients=2))
    return replace(made, **changes)  # type: ignore[arg-type]


def in_child(made: Toys, watch: Callable[[str, int], None]) -> int | None:
    """Train in a forked child; its exit code (negative: the signal that ended it)."""
    child = FORK.Process(target=made.train, args=(watch,))
    child.start()
    child.join(60)
    return child.exitcode


def dying(at: int) -> Callable[[str, int], None]:
    """A watcher that kills its process at the `at`-th event."""
    seen = 0

    def watch(event: str, round: int) -> None:
        nonlocal seen
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    return watch


def events(made: Toys) -> list[str]:
    seen: list[str] = []
    made.train(lambda event, _: seen.append(event))
    return seen


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_at_every_event(strategy: str, ram: Path) -> None:
    undisturbed = toys(ram / "whole", strategy)
    total = events(undisturbed)
    # a site's state has moved before each `answer`; the coordinator's checkpoint comes later
    assert {"ask", "answer", "fold", "checkpoint", "evaluate"} <= set(total)
    for at in range(len(strategy) % EVERY, len(total), EVERY):
        made = toys(ram / str(at), strategy)
        assert in_child(made, dying(at)) == -signal.SIGKILL
        made.train()
        assert made.ending() == undisturbed.ending(), f"killed at event {at} ({total[at]})"


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "median"])
@pytest.mark.parametrize("workers", [2, 3])
def test_killed_with_workers(strategy: str, workers: int, ram: Path) -> None:
    undisturbed = toys(ram / "whole", strategy)
    total = len(events(undisturbed))
    for at in range(3, total, 3 * EVERY):
        made = toys(ram / str(at), strategy, workers=workers)
        assert in_child(made, dying(at)) == -signal.SIGKILL
        made.train()
        assert made.ending() == undisturbed.ending(), f"killed at event {at}"


class Ill:
    """A site that fails in a round as long as the file `well` does not exist."""

    def __init__(self, site: Handler, well: Path, round: int) -> None:
        self.site, self.well, self.round = site, well, round

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        if (
            instruction.round == self.round
            and instruction.stage.startswith("train")
            and not self.well.exists()
        ):
            return Reply(instruction.site, Failure("memory"))
        return self.site.handle(instruction, common)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failed_site_recovers_before_the_resume(strategy: str, ram: Path) -> None:
    well = ram / "well"

    def wrap(site: Handler, name: str) -> Handler:
        # the sums of this task are there after one round
        return Ill(site, well, 1 if strategy == "sums" else 2) if name == "site_1" else site

    undisturbed = toys(ram / "whole", strategy, wrap=wrap)
    total = events(undisturbed)
    journal = [json.loads(line) for line in (undisturbed.folder / "journal.jsonl").read_text().splitlines()]
    if strategy != "fedbuff":  # there site_1 may still be busy with round 1
        assert [e["code"] for e in journal if "code" in e] == ["memory"]
    for at in range(1, len(total), 2 * EVERY):
        well.unlink(missing_ok=True)
        made = toys(ram / str(at), strategy, wrap=wrap)
        assert in_child(made, dying(at)) == -signal.SIGKILL
        failed = (
            (made.folder / "journal.jsonl").read_text() if (made.folder / "journal.jsonl").exists() else ""
        )
        if '"code": "memory"' in failed:
            well.touch()  # it has failed once, and is well again when the run goes on
        made.train()
        assert made.ending() == undisturbed.ending(), f"killed at event {at} ({total[at]})"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("last", [2, 3])
def test_a_truncated_checkpoint_is_passed_over(strategy: str, last: int, ram: Path) -> None:
    """Every offset: the one before is found. Full resumes at the ends and in the middle of each file."""
    undisturbed = toys(ram / "whole", strategy)
    total = events(undisturbed)
    at = [i for i, event in enumerate(total) if event == "checkpoint"][last - 1]
    killed = toys(ram / "killed", strategy)
    assert in_child(killed, dying(at)) == -signal.SIGKILL
    newest = killed.folder / "checkpoints" / f"round-{last:04d}"
    assert sum(path.stat().st_size for path in newest.iterdir()) <= 20_000
    for path in sorted(newest.iterdir()):
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            found, damaged = latest(newest.parent)
            assert found is not None
            assert found.round == last - 1
            assert len(damaged) == 1
        for size in (0, len(whole) - 1):
            path.write_bytes(whole[:size])
            made = toys(ram / f"{path.name}-{size}", strategy)
            shutil.copytree(killed.folder, made.folder)
            made.train()
            assert made.ending() == undisturbed.ending(), f"{path.name} cut to {size} bytes"
        path.write_bytes(whole)


def test_no_checkpoint_left_is_an_error(ram: Path) -> None:
    made = toys(ram / "run", "fedavg")
    made.train()
    for path in (made.folder / "checkpoints").glob("*/state.json"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Stop, match=r"no intact checkpoint .*state.json is damaged"):
        made.train()


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "ditto"])
def test_durable_sites_answer_again_without_training(strategy: str, ram: Path) -> None:
    """Killed after all have answered: the resumed round takes the kept replies."""
    undisturbed = toys(ram / "whole", strategy, durable=True)
    total = events(undisturbed)
    at = [i for i, event in enumerate(total) if event == "checkpoint"][1]
    made = toys(ram / "run", strategy, durable=True)
    assert in_child(made, dying(at - 1)) == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in (made.folder / "sites").rglob("*.safetensors")}
    with made.opened() as run:
        run._propose()
        run._round(2)
    after = {path: path.stat().st_mtime_ns for path in (made.folder / "sites").rglob("*.safetensors")}
    assert after == before  # nothing was trained, so nothing was written
    made.train()
    assert made.ending() == undisturbed.ending()
