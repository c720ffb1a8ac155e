"""What a coordinator without a task does about each run that SuperLink knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from server.control import Control, Entry
from server.recovery import CANCEL, settle
from server.runfolder import RunFolder, prepare
from tests.toys import toy_plan


@dataclass
class Desk:
    """SuperLink's runs, and what is done to them."""

    entries: list[Entry]
    started: list[dict[str, str]] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)

    def runs(self) -> list[Entry]:
        return self.entries

    def start(self, bundle: bytes, settings: Mapping[str, str]) -> int:
        self.started.append(dict(settings))
        return 99

    def stop(self, run: int) -> None:
        self.stopped.append(run)


def entry(id: int, status: str, sub: str = "", details: str = "", name: str = "a") -> Entry:
    return Entry(id, name, status, sub, details, False)


AGAIN, CANCELLED = {"run": "a"}, {"run": "a", CANCEL: "yes"}
LOST = entry(1, "finished", "failed", "No heartbeat received from the task")

#: entries, how the directory ended before → what is started, what is stopped, how it ends
CASES: dict[str, tuple[list[Entry], str, list[dict[str, str]], list[int], str]] = {
    "waits for its turn": ([entry(1, "pending")], "", [], [], ""),
    "claimed, token lost": ([entry(1, "starting")], "", [AGAIN], [1], ""),
    "runs, token lost": ([entry(1, "running")], "", [AGAIN], [1], ""),
    "lease over": ([LOST], "", [AGAIN], [], ""),
    "lease over, next one waits": ([LOST, entry(2, "pending")], "", [], [], ""),
    "lease over, next one is lost too": ([LOST, entry(2, "running")], "", [AGAIN], [2], ""),
    "stopped by an operator": ([entry(1, "finished", "stopped")], "", [CANCELLED], [], "stopped"),
    "failed for a reason": ([entry(1, "finished", "failed", "DISK_FULL")], "", [], [], "DISK_FULL"),
    "completed": ([entry(1, "finished", "completed")], "", [], [], "completed"),
    "ended, and nothing to do": ([LOST], "completed", [], [], "completed"),
    "ended, but its task is claimed": ([entry(1, "running")], "stopped", [], [1], "stopped"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_run_is_set_right(case: str, ram: Path) -> None:
    entries, said, started, stopped, ends = CASES[case]
    folder = prepare(ram / "a", toy_plan(), ["site_0"])
    if said:
        folder.end(said)
    desk = Desk(entries)
    settle(cast(Control, desk), ram)
    assert (desk.started, desk.stopped, folder.said) == (started, stopped, ends)


@pytest.mark.parametrize("name", ["../a", "/a", "", "b", "a/../a", "."])
def test_a_name_that_is_a_path_opens_nothing(name: str, ram: Path) -> None:
    prepare(ram / "a", toy_plan(), ["site_0"])
    before = (ram / "a" / "run.json").read_bytes()
    (ram / "runs").mkdir()
    desk = Desk([entry(1, "finished", "completed", name=name)])
    settle(cast(Control, desk), ram / "runs")
    assert (ram / "a" / "run.json").read_bytes() == before
    assert not desk.started


def test_a_run_directory_is_opened_by_its_name(ram: Path) -> None:
    made = prepare(ram / "a", toy_plan(), ["site_0"])
    assert RunFolder.named(ram, "a") == made
    run: dict[str, Any] = json.loads((ram / "a" / "run.json").read_bytes())
    assert run["id"] == made.id
