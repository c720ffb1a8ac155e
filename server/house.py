"""The coordinator's folder: keys, sites, runs; what is started from it, and what an operator does with it.

FOLDER/keys/        ca.crt, server.crt, server.key, superexec (a secret of 32 bytes)
FOLDER/sites.json   each site's name and its node's public key (PEM)
FOLDER/runs/        run directories
FOLDER/superlink.json   where SuperLink listens, while it is served
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from pydantic import TypeAdapter, ValidationError

from conf.exits import Exit, Stop
from conf.files import only_one, write_atomic
from conf.schema import Baseline, Data, Runtime, Settings, SiteName, complaint
from server.control import Control, Entry, bundle, control
from server.progress import note
from server.runfolder import NAME, RunFolder
from server.supervisor import Supervisor

PROJECT = Path(__file__).resolve().parents[1]
_SITES = TypeAdapter(dict[SiteName, str])
_KEYS = ("ca.crt", "server.crt", "server.key", "superexec")


@dataclass(frozen=True)
class House:
    """A coordinator's folder, and the port on 127.0.0.1 where its SuperLink listens."""

    folder: Path
    port: int

    @classmethod
    def served(cls, folder: Path) -> House:
        """The folder, as it is being served.

        Raises:
            Stop: (`LINK`) it is not.
        """
        try:
            return cls(folder, int(json.loads((folder / "superlink.json").read_bytes())["port"]))
        except (OSError, ValueError, KeyError):
            raise Stop(Exit.LINK, f"{folder} is not served; start it: wardround serve {folder}") from None

    @property
    def keys(self) -> Path:
        """Certificates and secrets."""
        return self.folder / "keys"

    @property
    def sites(self) -> dict[str, str]:
        """Each site's public key.

        Raises:
            Stop: (`CONFIG`).
        """
        return read_sites(self.folder / "sites.json")

    def to_superlink(self) -> list[str]:
        """Arguments of whoever connects to SuperLink."""
        certificates = str(self.keys / "ca.crt")
        return ["--superlink", f"127.0.0.1:{self.port}", "--certificates", certificates]

    def superlink(self) -> list[str]:
        """SuperLink's command."""
        keys, binary = self.keys, Path(sys.executable).parent / "flower-superlink"
        return [
            *(str(binary), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", str(keys / "ca.crt")),
            *("--ssl-certfile", str(keys / "server.crt"), "--ssl-keyfile", str(keys / "server.key")),
            "--enable-supernode-auth",
            *("--isolation", "process", "--superexec-auth-secret-file", str(keys / "superexec")),
            *("--database", str(self.folder / "superlink.db")),
            "--disable-runtime-dependency-installation",
        ]

    def coordinator(self, module: str = "server.coordinator") -> list[str]:
        """The coordinator's command."""
        return [
            *(sys.executable, "-m", module, *self.to_superlink()),
            *("--secret", str(self.keys / "superexec"), "--sites", str(self.folder / "sites.json")),
            *("--runs", str(self.folder / "runs"), "--token", str(self.folder / "task.json")),
        ]

    def environment(self) -> dict[str, str]:
        """Of the processes: Flower sends no telemetry, and keeps its files here."""
        home = str(self.folder / "home")
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(PROJECT),
            "HOME": home,
            "FLWR_HOME": home,
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            **{k: v for k, v in os.environ.items() if k.startswith(("WARDROUND_", "LD_LIBRARY"))},
        }

    def supervisor(self) -> Supervisor:
        """Keeps the processes of this folder going."""
        (self.folder / "home").mkdir(exist_ok=True)
        return Supervisor(self.folder, self.folder / "log", self.environment())

    def control(self) -> AbstractContextManager[Control]:
        """What an operator can do at SuperLink."""
        return control(f"127.0.0.1:{self.port}", (self.keys / "ca.crt").read_bytes())

    def healthy(self) -> bool:
        """Whether SuperLink answers."""
        trusted = ssl.create_default_context(cafile=str(self.keys / "ca.crt"))
        with suppress(httpx.HTTPError):
            at = f"https://127.0.0.1:{self.port}/health"
            return httpx.get(at, verify=trusted, trust_env=False).status_code == httpx.codes.OK
        return False

    def register(self) -> None:
        """Let in the nodes of all sites; those that are let in already stay."""
        with self.control() as superlink:
            for site, key in self.sites.items():
                superlink.register(site, key)

    # ---- what commands do

    def serve(self, ready: Callable[[str], None]) -> None:
        """Run SuperLink and the coordinator until told to stop.

        Raises:
            Stop: (`CONFIG`, `LINK`) a key is missing; it is served already; SuperLink does not come up.
        """
        if missing := [name for name in _KEYS if not (self.keys / name).is_file()]:
            raise Stop(Exit.CONFIG, f"{self.keys} lacks {', '.join(missing)}")
        os.umask(0o077)  # SuperLink's database holds every site's update
        another = Stop(Exit.LINK, f"{self.folder} is served already; see: wardround status {self.folder}")
        with only_one(self.folder / ".lock", another):
            self._serve(ready, len(self.sites))

    def _serve(self, ready: Callable[[str], None], count: int) -> None:
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        with self.supervisor() as processes:
            processes.start("superlink", self.superlink())
            processes.start("coordinator", self.coordinator())
            until("SuperLink", self.healthy, f"logs: {processes.logs}")
            self.register()
            write_atomic(self.folder / "superlink.json", json.dumps({"port": self.port}).encode())
            ready(f"serving {count} sites at 127.0.0.1:{self.port}")
            stop.wait()
        (self.folder / "superlink.json").unlink(missing_ok=True)

    def submit(self, settings: Settings) -> RunFolder:
        """Freeze a plan into a run directory, and start the run.

        Raises:
            Stop: (`CONFIG`, `RUN_EXISTS`, `LINK`).
        """
        from server.evaluate import check_metric  # these bring torch
        from server.privacy import calibrated
        from server.transfer import begin

        if other := sorted(set(settings.baselines) - {"trivial"}):
            note(f"left out: baselines {', '.join(other)} would need the cases here")
        path = self.folder / "runs" / Path(settings.run.dir or settings.run.experiment).name
        if not NAME.fullmatch(path.name):
            raise Stop(
                Exit.CONFIG, f"run.dir is {path.name!r}; need letters, digits, '_', '-' and '.' (128 at most)"
            )
        if settings.data.plan == "auto":
            raise Stop(Exit.CONFIG, "data.plan is 'auto', which is for simulated sites; set data.plan=given")
        if settings.plan.chooses_beside_privacy:
            raise Stop(
                Exit.CONFIG,
                "federation.choose=best and patience go by validation metrics, which privacy.metrics=home "
                "keeps at the sites; set privacy.metrics=noised, or choose=last and patience=0",
            )
        data, runtime = Data(root="each site's own"), Runtime(name="flower")
        own: tuple[Baseline, ...] = ("trivial",) if "trivial" in settings.baselines else ()
        plan = calibrated(settings.plan)
        check_metric(plan)
        federation = plan.federation.model_copy(update={"scores": "binned"})  # hospitals tell sums alone
        given = settings.model_copy(
            update={
                "plan": plan.model_copy(update={"federation": federation}),
                "data": data,
                "runtime": runtime,
                "baselines": own,
            }
        )
        if not self.healthy():
            raise Stop(
                Exit.LINK, f"SuperLink does not answer at 127.0.0.1:{self.port}; see {self.folder}/log"
            )
        given, initial = begin(given)
        made = RunFolder.create(path, given, list(self.sites), initial)
        try:
            with self.control() as superlink:
                superlink.start(bundle(), {"run": path.name})
        except Stop as stop:
            made.end(stop.exit.name)
            raise
        return made

    def status(self) -> list[str]:
        """A line on the sites, and one for each run."""
        with self.control() as superlink:
            lines = [f"{superlink.online()} of {len(self.sites)} sites are online at 127.0.0.1:{self.port}"]
        for path in sorted((self.folder / "runs").glob("*/run.json")):
            try:
                run, timing = RunFolder.open(path.parent), path.with_name("timing.jsonl")
            except Stop as stop:  # the others are shown all the same
                lines.append(f"{path.parent.name}: {stop}")
                continue
            done = len(timing.read_text().splitlines()) if timing.exists() else 0
            rounds = run.settings.plan.federation.rounds
            lines.append(f"{run.path.name}: {min(done, rounds)} of {rounds} rounds, {run.said or 'goes on'}")
        return lines

    def stop(self, run: RunFolder) -> str:
        """Stop a run here and at its sites; how it ended.

        Raises:
            Stop: (`LINK`) the coordinator does not take notice.
        """
        if run.said:
            return run.said
        with self.control() as superlink:
            active = self._active(superlink, run)
            for entry in active:
                superlink.stop(entry.id)
        if all(entry.status == "pending" for entry in active):  # the coordinator has not seen it
            run.end("stopped")
        until("the run's end", lambda: bool(run.said), f"is the coordinator up? logs: {self.folder}/log", 30)
        return run.said

    def resume(self, run: RunFolder) -> str:
        """Start a run again that has ended before its last round; what it does now."""
        said = run.said
        if said == "completed":
            return "has ended: completed"
        with self.control() as superlink:
            if said or not self._active(superlink, run):
                superlink.start(bundle(), {"run": run.path.name})
        if said:  # later: the coordinator would tell the sites of a run that is open, and was stopped, to end
            run.reopen()
        return f"goes on; see: wardround status {self.folder}"

    @staticmethod
    def _active(superlink: Control, run: RunFolder) -> list[Entry]:
        """Flower's runs for a directory that have not ended, but for those that tell sites to end theirs."""
        name = run.path.name
        return [e for e in superlink.runs() if e.name == name and e.status != "finished" and not e.cancels]


def read_sites(path: Path) -> dict[str, str]:
    """Each site's name and its node's public key (PEM).

    Raises:
        Stop: (`CONFIG`).
    """
    try:
        sites = _SITES.validate_json(path.read_bytes())
    except ValidationError as error:
        raise Stop(Exit.CONFIG, f"{path}: {complaint(error, 'site ')}") from None
    except OSError as error:
        raise Stop(Exit.CONFIG, f"{path} cannot be read ({type(error).__name__})") from None
    if not sites or len({key.strip() for key in sites.values()}) < len(sites):
        raise Stop(Exit.CONFIG, f"{path} names no site, or two with one key; need a key (PEM) for each")
    return sites


def of_run(path: Path) -> tuple[House, RunFolder]:
    """The served folder that a run directory is in, and the run.

    Raises:
        Stop: (`NO_RUN`, `LINK`).
    """
    run = RunFolder.open(path.absolute())
    return House.served(run.path.parent.parent), run


def until(
    what: str, true: Callable[[], bool], hint: str, seconds: float = 60.0, pause_s: float = 0.05
) -> None:
    """Wait for something.

    Raises:
        Stop: (`LINK`) it did not come.
    """
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise Stop(Exit.LINK, f"{what} did not come within {seconds:g} s; {hint}")
        time.sleep(pause_s)
