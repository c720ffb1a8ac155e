"""A whole federation on this machine: SuperLink with TLS and node keys, coordinator, agents, trainers.

`python -m deploy.loopback` (`make loopback`) runs a plan on generated patients; the federation tests start
the same processes. Everything lives in one folder, listens on loopback, and ends with the context.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Self

import httpx

from conf.exits import Exit, Stop
from conf.schema import Baseline, Plan
from deploy.keys import authority, node, secret
from server.control import Control, bundle
from server.house import House, until
from server.runfolder import prepare


class Loopback:
    """A federation of named sites below a folder.

    Args:
        trainer: the command that serves a site: its name and its socket are given.
        coordinator: the module that is run as coordinator.
        wait_s: how long a site holds a call.
    """

    def __init__(
        self,
        folder: Path,
        sites: Sequence[str],
        trainer: Callable[[str, Path], Sequence[str]],
        *,
        coordinator: str = "server.coordinator",
        wait_s: float = 5.0,
    ) -> None:
        self.folder = folder
        self.sites = list(sites)
        self.port = free_port()
        self.metrics = {name: free_port() for name in ("coordinator", *(f"agent-{s}" for s in sites))}
        self._trainer = trainer
        self._coordinator = coordinator
        self._wait_s = wait_s
        self.house = House(folder, self.port)

    # ---- life

    def __enter__(self) -> Self:
        for part in ("keys", "runs", "run"):
            (self.folder / part).mkdir(parents=True)
        keys = self.folder / "keys"
        authority(keys)
        secret(keys / "superexec")
        self.keys = {site: node(keys / site) for site in self.sites}
        (self.folder / "sites.json").write_text(json.dumps(self.keys))
        self.bundle = bundle()
        (self.folder / "bundles").write_text(hashlib.sha256(self.bundle).hexdigest() + "\n")
        with ExitStack() as stack:
            self.processes = stack.enter_context(self.house.supervisor())
            self._up()
            self._stack = stack.pop_all()
        return self

    def _up(self) -> None:
        self.start("superlink", self.superlink())
        self.start("coordinator", self.coordinator())
        for site in self.sites:
            self.start(f"trainer-{site}", self._trainer(site, self.socket(site)))
        self.until("SuperLink", self.house.healthy)
        self.house.register()
        for site in self.sites:
            self.start(f"agent-{site}", self.agent(site))

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # ---- processes

    def socket(self, site: str) -> Path:
        """Where a site's trainer listens."""
        return self.folder / "run" / site / "t.sock"

    def superlink(self) -> list[str]:
        """SuperLink's command."""
        return self.house.superlink()

    def coordinator(self) -> Sequence[str]:
        """The coordinator's command."""
        metrics = str(self.metrics["coordinator"])
        return [
            *self.house.coordinator(self._coordinator),
            *("--wait", str(self._wait_s), "--metrics", metrics),
        ]

    def agent(self, site: str) -> Sequence[str]:
        """A site's agent's command."""
        return [
            *(sys.executable, "-m", "client.agent", *self.house.to_superlink()),
            *("--key", str(self.folder / "keys" / site), "--bundles", str(self.folder / "bundles")),
            *("--socket", str(self.socket(site)), "--lease", str(self.folder / "run" / site / "lease")),
            *("--metrics", str(self.metrics[f"agent-{site}"])),
        ]

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a process, and start it again whenever it ends."""
        self.processes.start(name, command)

    def pid(self, name: str) -> int:
        """The number of a running process."""
        return self.processes.pid(name)

    def kill(self, name: str) -> None:
        """SIGKILL; the supervisor will start it again."""
        self.processes.kill(name)

    # ---- what one does with it

    def until(
        self, what: str, true: Callable[[], bool], seconds: float = 60.0, pause_s: float = 0.05
    ) -> None:
        """Wait for something.

        Raises:
            Stop: (`LINK`) it did not come.
        """
        until(what, true, f"logs: {self.folder / 'log'}", seconds, pause_s)

    def submit(self, name: str, plan: Plan, baselines: Sequence[Baseline] = ()) -> int:
        """Start a run of a plan; returns Flower's number of it."""
        prepare(self.folder / "runs" / name, plan, self.sites, baselines)
        with self.control() as superlink:
            return superlink.start(self.bundle, {"run": name})

    def control(self) -> AbstractContextManager[Control]:
        """What an operator can do at SuperLink."""
        return self.house.control()

    def logs(self, size: int = 2000) -> str:
        """The ends of all logs."""
        logs = sorted((self.folder / "log").iterdir())
        return "\n".join(f"== {log.name}\n{log.read_text(errors='replace')[-size:]}" for log in logs)

    def finish(self, run: int, seconds: float = 300.0) -> str:
        """Wait for a run's end; `completed`, or `failed: EXIT`."""
        said = ("", "", "")
        with self.control() as superlink:

            def over() -> bool:
                nonlocal said
                with suppress(httpx.HTTPError):
                    said = superlink.status(run)
                return said[0] == "finished"

            self.until(f"the end of run {run}", over, seconds, 0.3)
        return said[1] if not said[2] else f"{said[1]}: {said[2]}"


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rehearse(folder: Path, rounds: int) -> None:
    """Generate a hospital's patients for each of three sites, train over loopback, and show the result.

    Raises:
        Stop: a process did not come up, or the run failed.
    """
    from conf.load import compose
    from conf.schema import Columns
    from server.report.table import show
    from tasks.data.cache import Cache
    from tasks.data.ingest import ingest
    from tasks.data.patients import patient_key
    from tasks.data.phantom import make_phantom
    from tasks.data.phantom_files import MIXED

    began = time.monotonic()

    def say(text: str) -> None:
        sys.stdout.write(f"{time.monotonic() - began:5.1f} s  {text}\n")

    make_phantom(folder / "hospitals", hospitals=3, patients=4, size=48, forms=MIXED)
    sites = sorted(path.name for path in (folder / "hospitals").iterdir())
    for site in sites:
        home = folder / "sites" / site
        home.mkdir(parents=True)
        key = patient_key(home / "state" / "patient.key")
        root, cache = folder / "hospitals" / site, Cache(home / "cache")
        ingest(root, cache, manifest=None, columns=Columns(), label_map=None, key=key)
        socket_path = folder / "federation" / "run" / site / "t.sock"
        # generated patients: every count may leave
        about = {"name": site, "cache": "cache", "socket": str(socket_path), "policy": {"minimum_cell": 1}}
        (home / "site.yaml").write_text(json.dumps(about))
    say(f"{len(sites)} hospitals of generated patients")
    overrides = [
        "+experiment=demo",
        "data.root=.",
        "run.dir=.",
        f"federation.rounds={rounds}",
        "local.steps=4",
    ]
    plan = compose(overrides).plan

    def trainer(site: str, _: Path) -> list[str]:
        return [sys.executable, "-m", "client.trainer", str(folder / "sites" / site / "site.yaml")]

    with Loopback(folder / "federation", sites, trainer) as loop:
        say("SuperLink, coordinator, three agents and trainers are up")
        said = loop.finish(loop.submit("rehearsal", plan))
        say(f"run {said}")
    say("all processes have ended")
    if said != "completed":
        raise Stop(Exit.INTERNAL, f"the run {said}; logs: {folder / 'federation' / 'log'}")
    show(folder / "federation" / "runs" / "rehearsal")


def main(arguments: Sequence[str] | None = None) -> None:
    """`python -m deploy.loopback`: the whole of a federation once, in a temporary folder or a given one."""
    parser = argparse.ArgumentParser(
        prog="deploy.loopback", description="A federation on this machine, once."
    )
    parser.add_argument("--folder", type=Path, help="a new folder, which stays [default: a temporary one]")
    parser.add_argument("--rounds", type=int, default=2)
    asked = parser.parse_args(arguments)
    if asked.folder is not None:
        asked.folder.mkdir(parents=True)
        rehearse(asked.folder.absolute(), asked.rounds)
        return
    with tempfile.TemporaryDirectory(prefix="wardround-") as folder:
        rehearse(Path(folder), asked.rounds)


if __name__ == "__main__":
    main()
