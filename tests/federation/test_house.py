"""The coordinator's commands on real processes: serve, submit, status, logs, stop, resume."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from conf.exits import Stop
from deploy.keys import authority, node, secret
from deploy.loopback import free_port
from server.house import PROJECT, House
from server.runfolder import RunFolder

pytestmark = pytest.mark.federation


def wardround(*arguments: object, code: int = 0) -> str:
    """Run a command; its output."""
    command = [sys.executable, "-c", "from server.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(module_ram: Path) -> Path:
    """A coordinator's folder, empty of runs, with two sites that never come."""
    folder = module_ram / "house"
    (folder / "keys").mkdir(parents=True)
    authority(folder / "keys")
    secret(folder / "keys" / "superexec")
    sites = {name: node(module_ram / name) for name in ("north", "south")}
    (folder / "sites.json").write_text(json.dumps(sites))
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Path]:
    assert "is not served" in wardround("status", folder, code=43)
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", str(folder)]
    process = subprocess.Popen([*command, "--port", str(free_port())], cwd=PROJECT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert b"serving 2 sites" in process.stdout.readline()
    yield folder
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    process.stdout.close()
    assert not (folder / "superlink.json").exists()


def test_a_run_is_submitted_shown_stopped_and_resumed(served: Path) -> None:
    said = wardround("submit", served, "+experiment=demo", "run.dir=first", "federation.rounds=2")
    assert "left out: baselines local, pooled" in said
    run = served / "runs" / "first"
    assert RunFolder.open(run).sites == ("north", "south")
    assert yaml.safe_load((run / "config.yaml").read_text())["runtime"]["name"] == "flower"
    assert "run.dir" in wardround("submit", served, "+experiment=demo", "run.dir=first", code=30)

    until = time.monotonic() + 60
    while "round 0 of 2: ask" not in wardround("logs", run):
        assert time.monotonic() < until, (served / "log" / "coordinator.log").read_text()
    shown = wardround("status", served)
    assert "first" in shown
    assert "0 of 2" in shown
    assert "goes on" in shown

    assert "stopped" in wardround("stop", run)
    assert RunFolder.open(run).said == "stopped"
    assert "stopped" in wardround("status", served)
    assert "goes on" in wardround("resume", run)
    assert RunFolder.open(run).said == ""
    assert "goes on" in wardround("resume", run)  # once is enough
    with House.served(served).control() as superlink:
        assert len(House._active(superlink, RunFolder.open(run))) == 1
    wardround("stop", run)
    RunFolder.open(run).end("completed")
    assert "has ended: completed" in wardround("resume", run)


def test_mistakes_are_one_line(served: Path, tmp_path: Path) -> None:
    assert "coordinator's folder first" in wardround("submit", "+experiment=demo", code=2)
    assert "federation.rounds" in wardround("submit", served, "federation.rounds=0", code=12)
    assert "run.dir is 'my run'" in wardround(
        "submit", served, "+experiment=demo", "run.dir='my run'", code=10
    )
    assert "data.plan is 'auto'" in wardround("submit", served, "+experiment=demo", "data.plan=auto", code=10)
    assert "is served already" in wardround("serve", served, code=43)
    assert (served / "superlink.json").exists()
    assert "not a run directory" in wardround("stop", tmp_path, code=31)
    assert "is not served" in wardround("submit", tmp_path, "+experiment=demo", code=43)
    assert "lacks ca.crt" in wardround("serve", tmp_path, code=10)
    House.served(served).register()  # again: known sites stay
    with House.served(served).control() as superlink, pytest.raises(Stop, match="site west is not taken"):
        superlink.register("west", "no key")
