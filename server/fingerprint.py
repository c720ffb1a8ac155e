"""A run of one question, what are the sites' data like? Its answer gives a plan and a report on the sites."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from conf.exits import Exit, Stop
from conf.files import scratch_prefix, write_atomic
from conf.schema import Plan, Section, Settings
from server.checkpoint import latest
from server.heterogeneity import Comparison, compare
from server.planning import Decision, as_json, fragment, plan_from
from server.progress import note
from server.runfolder import RunFolder
from server.simulate import Federation, Simulation
from strategies.base import Study
from tasks.base import build_task
from tasks.data.fingerprint import CELLS, Fingerprint


@dataclass(frozen=True)
class Found:
    """What a fingerprint run found.

    Attributes:
        merged: over all sites that answered, and how many did. sites: of each, where each answer was kept.
        plan: what the rules make of it, and the decisions with their reasons. compared: the sites.
    """

    merged: Fingerprint
    answered: int
    sites: Mapping[str, Fingerprint]
    plan: Plan
    decisions: tuple[Decision, ...]
    compared: Comparison

    @classmethod
    def read(cls, path: Path, settings: Settings) -> Found:
        """From the last checkpoint of a fingerprint run, simulated or deployed.

        Raises:
            Stop: (`NO_RUN`) there is none.
        """
        progress, _ = latest(path / "checkpoints")
        if progress is None or "merged" not in progress.state:
            raise Stop(Exit.NO_RUN, f"{path} holds no fingerprint; make one with: wardround fingerprint")
        zero = build_task(settings.plan).survey().zero()
        merged = zero.from_vector(progress.state["merged"])
        sites = {name: zero.from_vector(vector) for name, vector in progress.state["sites"].items()}
        plan, decisions = plan_from(
            merged,
            settings.plan,
            answered := int(progress.state["answered"]),
            pinned=settings.pinned,
            memory_gb=settings.data.memory_gb,
        )
        return cls(merged, answered, sites, plan, tuple(decisions), compare(sites))

    def write(self, path: Path) -> None:
        """`fingerprint.json`, `sites.txt`, `sites.html` and, an experiment, `experiment/auto.yaml`."""
        from server.report.sites import save

        tree = {
            "cells": {name: vars(cells) for name, cells in CELLS.items()},
            "merged": _plain(self.merged),
            "sites": {name: _plain(one) for name, one in sorted(self.sites.items())},
            "rules": as_json(self.decisions),
            **self.compared.as_json(),
        }
        write_atomic(path / "fingerprint.json", json.dumps(tree, sort_keys=True).encode())
        (path / "experiment").mkdir(exist_ok=True)
        text = fragment(self.decisions, self.merged.patients, self.answered)
        write_atomic(path / "experiment" / "auto.yaml", text.encode())
        save(self, path)


def _plain(one: Fingerprint) -> dict[str, object]:
    """Filled cells by histogram and row: `{"spacing": [{"169": 63}, …]}`; and medians."""
    found: dict[str, object] = {"medians": one.value()}
    for name, cells in CELLS.items():
        rows = getattr(one, name).reshape(-1, cells.size)
        found[name] = [
            {str(cell): int(row[cell]) for cell in row.nonzero().flatten().tolist()} for row in rows
        ]
    return found


def reopen(path: Path) -> Found:
    """What a finished fingerprint run found, simulated or deployed; its files are written again.

    Raises:
        Stop: (`NO_RUN`).
    """
    found = Found.read(path, RunFolder.open(path).settings)
    found.write(path)
    return found


def question(settings: Settings) -> Settings:
    """The settings of the fingerprint run that goes before a training run."""
    rules = settings.plan.federation.model_copy(update={"rounds": 1, "cohort": 0})
    plan = settings.plan.model_copy(
        update={"strategy": Section(name="fingerprint", per_site=True), "federation": rules}
    )
    return settings.model_copy(update={"plan": plan, "baselines": ()})


def fingerprint(settings: Settings) -> tuple[Found, Path]:
    """Ask simulated sites for their fingerprints; returns what was found, and the run's directory.

    Raises:
        Stop: with the reason and its exit code.
    """
    if settings.run.dir is None:
        raise Stop(Exit.CONFIG, "run.dir is not set; give the directory to write: run.dir=runs/NAME")
    path = Path(settings.run.dir).absolute()
    if path.exists():
        raise Stop(Exit.RUN_EXISTS, f"run.dir {path} exists; choose another")
    Study.of(settings.plan)  # every name and parameter, before anything is written
    return _ask(Federation.of(settings.data, settings.plan), settings, path), path


def _ask(federation: Federation, settings: Settings, path: Path) -> Found:
    asked = question(settings)
    simulation = Simulation(RunFolder.create(path, asked), federation)
    simulation.ask(asked.plan)
    found = Found.read(path, settings)
    found.write(path)
    return found


@contextmanager
def planned(federation: Federation, settings: Settings) -> Iterator[tuple[Settings, Path]]:
    """Settings with the plan that the data suggest, and the run it comes from, for the caller to keep."""
    with tempfile.TemporaryDirectory(prefix=scratch_prefix()) as scratch:
        path = Path(scratch) / "fingerprint"
        found = _ask(federation, settings, path)
        for one in found.decisions:
            note(f"{one.setting} = {one.value}: {one.reason}")
        for odd in found.compared.findings:
            note(f"site {odd.site} looks wrong: {odd.what}. {odd.advice}")
        yield settings.model_copy(update={"plan": found.plan}), path


def keep(path: Path, run: Path) -> None:
    """Move a fingerprint run into the training run that it planned."""
    shutil.copytree(path, run / "fingerprint")
