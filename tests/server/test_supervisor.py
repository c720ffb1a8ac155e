"""Processes are started again while they are wanted, told to end when they are not."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from server.supervisor import Supervisor

#: notes that it began, waits to be told to go, and takes a moment to leave
PROCESS = """
import pathlib, signal, sys, time
def go(*_):
    time.sleep(0.2)
    with notes.open("a") as file: file.write("ended\\n")
    sys.exit(0)
notes = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, go)
with notes.open("a") as file: file.write("began\\n")
time.sleep(60)
"""


def wait(notes: Path, lines: int) -> None:
    end = time.monotonic() + 20
    while not notes.exists() or len(notes.read_text().split()) < lines:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.federation
def test_a_killed_process_comes_back_and_ends_in_its_own_time(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with Supervisor(tmp_path, tmp_path / "log", {}) as kept:
        kept.start("a", [sys.executable, "-c", PROCESS, str(notes)])
        wait(notes, 1)
        kept.kill("a")
        wait(notes, 2)  # by the thread, whose end must not be its end
        pid = kept.pid("a")
    assert notes.read_text().split() == ["began", "began", "ended"]
    assert not psutil.pid_exists(pid)


@pytest.mark.federation
def test_a_process_that_was_ended_is_not_started_again(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    with Supervisor(tmp_path, tmp_path / "log", {}) as kept:
        kept.start("a", [sys.executable, "-c", PROCESS, str(notes)])
        wait(notes, 1)
        kept.end(["a"])
        time.sleep(0.5)
    assert notes.read_text().split() == ["began", "ended"]
