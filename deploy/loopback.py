"""A whole federation on this machine: SuperLink with TLS and node keys, coordinator, agents, trainers.

`python -m deploy.loopback` (`make loopback`) runs a plan on generated patients; the federation tests start
the same processes. Everything lives in one folder, listens on loopback, and ends with the context.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx

from conf.exits import Exit, Stop
from conf.schema import Baseline, Plan
from deploy.keys import authority, node, secret
from server.control import Control, bundle, control
from server.runfolder import prepare

PROJECT = Path(__file__).resolve().parents[1]
_FIRST_S, _LAST_S = 0.2, 5.0  # pauses of a supervisor before it starts a process again
_STEADY_S = 10.0  # a process that ran so long is started again at once
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


@dataclass
class _Kept:
    """A process that is started again when it ends, after a pause that grows."""

    command: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    pause: float = _FIRST_S
    due: float = 0.0


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
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._keeper = threading.Thread(target=self._keep, daemon=True)

    # ---- life

    def __enter__(self) -> Self:
        for part in ("log", "keys", "runs", "run", "home"):
            (self.folder / part).mkdir(parents=True)
        try:
            self._up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _up(self) -> None:
        keys = self.folder / "keys"
        authority(keys)
        secret(keys / "superexec")
        self.keys = {site: node(keys / site) for site in self.sites}
        (self.folder / "sites.json").write_text(json.dumps(self.keys))
        self.bundle = bundle()
        (self.folder / "bundles").write_text(hashlib.sha256(self.bundle).hexdigest() + "\n")
        self._keeper.start()
        self.start("superlink", self.superlink())
        self.start("coordinator", self.coordinator())
        for site in self.sites:
            self.start(f"trainer-{site}", self._trainer(site, self.socket(site)))
        self.until("SuperLink", self.healthy)
        with self.control() as superlink:
            for site, key in self.keys.items():
                superlink.register(site, key)
        for site in self.sites:
            self.start(f"agent-{site}", self.agent(site))

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._keeper.is_alive():
            self._keeper.join()
        # clients first: SuperLink waits half a minute for a connection that is still open
        self._stop([name for name in self._kept if name != "superlink"])
        self._stop(list(self._kept))

    def _stop(self, names: Sequence[str]) -> None:
        running = [p for name in names if (p := self._kept[name].process) is not None]
        for process in running:
            process.terminate()
        end = time.monotonic() + 3
        for process in running:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            process.kill()
            process.wait()

    # ---- processes

    def socket(self, site: str) -> Path:
        """Where a site's trainer listens."""
        return self.folder / "run" / site / "t.sock"

    def superlink(self) -> list[str]:
        """SuperLink's command."""
        keys, binary = self.folder / "keys", Path(sys.executable).parent / "flower-superlink"
        return [
            *(str(binary), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(keys / "ca.crt")),
            *("--ssl-certfile", str(keys / "server.crt"), "--ssl-keyfile", str(keys / "server.key")),
            "--enable-supernode-auth",
            *("--isolation", "process", "--superexec-auth-secret-file", str(keys / "superexec")),
            *("--database", str(self.folder / "superlink.db")),
            "--disable-runtime-dependency-installation",
        ]

    def coordinator(self) -> Sequence[str]:
        """The coordinator's command."""
        return [
            *(sys.executable, "-m", self._coordinator, *self._to_superlink()),
            *("--secret", str(self.folder / "keys" / "superexec")),
            *("--sites", str(self.folder / "sites.json")),
            *("--runs", str(self.folder / "runs"), "--token", str(self.folder / "task.json")),
            *("--wait", str(self._wait_s), "--metrics", str(self.metrics["coordinator"])),
        ]

    def agent(self, site: str) -> Sequence[str]:
        """A site's agent's command."""
        return [
            *(sys.executable, "-m", "client.agent", *self._to_superlink()),
            *("--key", str(self.folder / "keys" / site), "--bundles", str(self.folder / "bundles")),
            *("--socket", str(self.socket(site)), "--lease", str(self.folder / "run" / site / "lease")),
            *("--metrics", str(self.metrics[f"agent-{site}"])),
        ]

    def _to_superlink(self) -> list[str]:
        certificates = self.folder / "keys" / "ca.crt"
        return ["--superlink", f"127.0.0.1:{self.port}", "--certificates", str(certificates)]

    def start(self, name: str, command: Sequence[str]) -> None:
        """Start a process, and start it again whenever it ends."""
        with self._lock:
            kept = self._kept[name] = _Kept(command, self.folder / "log" / f"{name}.log")
            self._launch(kept)

    def pid(self, name: str) -> int:
        """The number of a running process."""
        process = self._kept[name].process
        if process is None:
            raise KeyError(name)
        return process.pid

    def kill(self, name: str) -> None:
        """SIGKILL; the supervisor will start it again."""
        os.kill(self.pid(name), signal.SIGKILL)

    def _launch(self, kept: _Kept) -> None:
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(PROJECT),
            "HOME": str(self.folder / "home"),
            "FLWR_HOME": str(self.folder / "home"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            **{k: v for k, v in os.environ.items() if k.startswith(("WARDROUND_", "LD_LIBRARY"))},
        }
        with kept.log.open("ab") as log:
            kept.process = subprocess.Popen(  # noqa: S603  its own commands
                list(kept.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env=environment,
                start_new_session=True,
                preexec_fn=_die_with_parent,  # nothing may outlive a killed test
            )
        kept.started = time.monotonic()

    def _keep(self) -> None:
        """The supervisor."""
        while not self._ended.wait(0.05):
            with self._lock:
                for kept in self._kept.values():
                    now = time.monotonic()
                    if kept.process is None:
                        if now >= kept.due:
                            self._launch(kept)
                    elif kept.process.poll() is not None:
                        kept.process = None
                        steady = now - kept.started > _STEADY_S
                        kept.pause = _FIRST_S if steady else min(2 * kept.pause, _LAST_S)
                        kept.due = now + kept.pause

    # ---- what one does with it

    def healthy(self) -> bool:
        """Whether SuperLink answers."""
        trusted = ssl.create_default_context(cafile=str(self.folder / "keys" / "ca.crt"))
        with suppress(httpx.HTTPError):
            at = f"https://127.0.0.1:{self.port}/health"
            return httpx.get(at, verify=trusted, trust_env=False).status_code == httpx.codes.OK
        return False

    def until(
        self, what: str, true: Callable[[], bool], seconds: float = 60.0, pause_s: float = 0.05
    ) -> None:
        """Wait for something.

        Raises:
            Stop: (`LINK`) it did not come.
        """
        end = time.monotonic() + seconds
        while not true():
            if time.monotonic() > end:
                raise Stop(
                    Exit.LINK, f"{what} did not come within {seconds:g} s; logs: {self.folder / 'log'}"
                )
            time.sleep(pause_s)

    def submit(self, name: str, plan: Plan, baselines: Sequence[Baseline] = ()) -> int:
        """Start a run of a plan; returns Flower's number of it."""
        prepare(self.folder / "runs" / name, plan, self.sites, baselines)
        with self.control() as superlink:
            return superlink.start(self.bundle, {"run": name})

    def control(self) -> AbstractContextManager[Control]:
        """What an operator can do at SuperLink."""
        return control(f"127.0.0.1:{self.port}", (self.folder / "keys" / "ca.crt").read_bytes())

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


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)


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
