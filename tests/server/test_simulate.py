"""Baselines in processes of their own: how they fail, and that they do not outlive what started them."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from conf.exits import Exit, Stop
from server.simulate import _side_by_side


def full() -> None:
    raise Stop(Exit.DISK_FULL, "disk full while writing x")


def test_a_baseline_that_stops_says_why_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stop, match="baseline pooled failed; its error stands above") as stop:
        _side_by_side({"pooled": (full, (), {}), "local:a": (lambda: None, (), {})})
    assert stop.value.exit is Exit.DISK_FULL
    assert capfd.readouterr().err == "error: disk full while writing x\n"


@pytest.mark.federation
def test_baselines_end_when_their_parent_is_killed() -> None:
    pid = os.fork()
    if pid == 0:
        _side_by_side({name: (time.sleep, (60,), {}) for name in "ab"})
        os._exit(0)
    parent = psutil.Process(pid)
    end = time.monotonic() + 20
    while not (children := parent.children()) and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children
    assert not alive
