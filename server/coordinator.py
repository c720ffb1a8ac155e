"""The coordinator: one process that takes Flower's ServerApp task itself and runs the round loop in it.

Killed, it comes back with the task's token, continues the same Flower run, and from the run directory the
same round: sites answer again what they have already answered.
"""

from __future__ import annotations

import argparse
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch
from flwr.serverapp import Grid

from conf.console import ended
from conf.exits import Exit, Stop
from conf.files import only_one, sweep_scratch
from server.anchors import Anchors
from server.exchange.flower import Courier, FlowerExchange
from server.house import read_sites
from server.link import Link, Post
from server.privacy import central_statement, charges, keep, statement, useless
from server.recovery import CANCEL, settle
from server.rounds import Run
from server.runfolder import RunFolder
from server.telemetry import Meter
from server.transfer import initial
from strategies import build_strategy
from strategies.base import Study
from strategies.code import code_digest
from tasks.start import HEAVY, without_plots

_FORMAT = "%(asctime)s %(message)s"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Coordinator:
    """Where runs are kept, and who takes part.

    Attributes:
        runs: folder of run directories. sites: each site's name and its node's public key (PEM).
        wait_s, lost_after_s: see `FlowerExchange`.
    """

    runs: Path
    sites: dict[str, str]
    wait_s: float = 20.0
    lost_after_s: float = 300.0
    meter: Meter = field(default_factory=Meter)

    def take(self, grid: Grid, settings: Mapping[str, object]) -> None:
        """Do what a Flower run was started for, and write down how the run directory ends.

        Raises:
            Stop: with the reason and its exit code.
        """
        folder = RunFolder.named(self.runs, str(settings.get("run", "")))
        known = {site: self.sites[site] for site in folder.sites if site in self.sites}
        if settings.get(CANCEL):
            Post(grid, known).end(folder.id)
            return
        with _ending(folder):
            if unknown := sorted(set(folder.sites) - known.keys()):
                raise Stop(Exit.CONFIG, f"the run names site {unknown[0]}; known: {', '.join(self.sites)}")
            self.conduct(Post(grid, known), folder)

    def conduct(self, courier: Courier, folder: RunFolder) -> None:
        """Train to the end, then score what the model is held against.

        Raises:
            Stop: with the reason and its exit code.
        """
        plan = folder.settings.plan
        torch.set_num_threads(1)
        exchange = FlowerExchange(
            courier,
            blobs=folder.path / "blobs",
            wait_s=self.wait_s,
            lost_after_s=self.lost_after_s,
            meter=self.meter,
            anchors=Anchors(self.runs / "anchors.json"),
        )

        def watch(event: str, r: int) -> None:
            self.meter.watch(event, r)
            log.info("round %d of %d: %s", r, plan.federation.rounds, event)

        run = Run(
            study=Study.of(plan, initial(folder.path)),
            strategy=build_strategy(plan),
            sites=sorted(folder.sites),
            exchange=exchange,
            folder=folder.path,
            id=folder.id,
            code=code_digest(),
            keep=folder.settings.run.keep,
            watch=watch,
        )
        for warning in run.warnings:
            log.warning("%s", warning)
        if word := useless(plan, len(folder.sites)):
            log.warning("%s", word)
        run.train()
        if plan.privacy.mode == "central":
            keep(central_statement(plan, len(folder.sites)), folder.path)
        if plan.privacy.mode == "dpsgd":
            charged = charges(plan, folder.path / "journal.jsonl")
            keep(statement(plan, charged, deployed=True), folder.path)
        for name in run.study.task.trivial() if "trivial" in folder.settings.baselines else ():
            if not run.metrics.has(run.progress.round, name):
                run.metrics.add(run.trivial(name, ("val", "test")))


@contextmanager
def _ending(folder: RunFolder) -> Iterator[None]:
    """Keep the run's log, and write down how it ended, and why."""
    book = logging.FileHandler(folder.path / "log.txt")
    book.setFormatter(logging.Formatter(_FORMAT))
    logging.getLogger().addHandler(book)
    try:
        yield
        folder.end("completed")
    except Stop as stop:
        log.error("error %d (%s): %s", stop.exit, stop.exit.name, stop)
        folder.end(stop.exit.name)
        raise
    except Exception:
        log.exception("error %d (%s)", Exit.INTERNAL, Exit.INTERNAL.name)
        folder.end(Exit.INTERNAL.name)
        raise
    finally:  # told to go, or the task was lost: the run is not at its end
        logging.getLogger().removeHandler(book)
        book.close()


def main(arguments: list[str] | None = None, preload: Sequence[str] = HEAVY) -> None:
    """`python -m server.coordinator --superlink HOST:PORT …`: take tasks until told to stop."""
    parser = argparse.ArgumentParser(prog="server.coordinator", description="Conduct runs over SuperLink.")
    parser.add_argument("--superlink", required=True, help="host:port")
    parser.add_argument("--certificates", type=Path, required=True, help="of SuperLink's authority, PEM")
    parser.add_argument("--secret", type=Path, required=True, help="the SuperExec secret's file")
    parser.add_argument("--sites", type=Path, required=True, help="JSON: site name to public key, PEM")
    parser.add_argument("--runs", type=Path, required=True, help="folder of run directories")
    parser.add_argument("--token", type=Path, required=True, help="file for the task's token")
    parser.add_argument("--wait", type=float, default=20.0, help="seconds a site may hold a call")
    parser.add_argument(
        "--lost-after", type=float, default=300.0, help="seconds until a silent site has failed"
    )
    parser.add_argument("--metrics", type=int, help="port on 127.0.0.1 for Prometheus")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format=_FORMAT)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    link = Link(asked.superlink, asked.certificates.read_bytes(), asked.secret.read_bytes())
    coordinator = Coordinator(asked.runs, read_sites(asked.sites), asked.wait, asked.lost_after)
    if asked.metrics:
        coordinator.meter.serve(asked.metrics)
    without_plots()
    heavy = threading.Thread(target=lambda: [import_module(name) for name in preload], daemon=True)
    heavy.start()  # while SuperLink and the sites come up
    sweep_scratch()
    asked.runs.mkdir(parents=True, exist_ok=True)
    another = Stop(Exit.LINK, f"another coordinator works in {asked.runs}; stop it first")
    # a task that this one does not hold is nobody's
    with only_one(asked.runs / ".coordinator.lock", another):
        while True:
            try:
                with link.task(asked.token, lambda superlink: settle(superlink, asked.runs)) as (
                    grid,
                    settings,
                ):
                    heavy.join()
                    coordinator.take(grid, settings)
            except Stop as stop:
                if stop.exit is Exit.LINK:
                    raise
                log.error("the task is over: %s", stop)


if __name__ == "__main__":
    ended(main)
