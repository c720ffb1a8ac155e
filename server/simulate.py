"""A whole federation on one machine: the sites' own code, on cases dealt out to simulated hospitals."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from client.site import Archive, Bench, Ledger, Plans, Policy, Site
from conf.console import ended
from conf.exits import HELP, Exit, Stop
from conf.schema import Data, Plan, Privacy, Section, Settings
from server.checkpoint import latest
from server.cluster import cluster
from server.evaluate import Line, check_metric
from server.exchange.local import LocalExchange
from server.exchange.pool import recycle
from server.exchange.virtual import VirtualExchange
from server.privacy import calibrated, central_statement, keep, statement, useless
from server.progress import bar, note
from server.rounds import Run
from server.runfolder import RunFolder
from server.supervisor import die_with_parent
from server.transfer import begin, initial
from strategies import QUESTIONS
from strategies.base import Tensors
from strategies.code import code_digest
from tasks.base import Task
from tasks.data.cache import Cache, Entry, default_cache
from tasks.data.dealing import federate, narrowed
from tasks.data.ingest import ingest
from tasks.data.released import Released
from tasks.seeds import generator

Splits = Mapping[str, tuple[Entry, ...]]

#: names simulated patients, alike on every machine; a hospital's own key is random and secret
_KEY = b"wardround simulation, no secret "


def simulate(settings: Settings) -> Path:
    """Run a simulation and return its directory.

    Raises:
        Stop: with the reason and its exit code; nothing is written for a mistake in the settings or data.
    """
    if settings.runtime.name == "flower":
        raise Stop(
            Exit.CONFIG, "runtime is 'flower'; simulate knows local and ray (real sites: wardround submit)"
        )
    if settings.run.dir is None:
        raise Stop(Exit.CONFIG, "run.dir is not set; give the directory to write: run.dir=runs/NAME")
    path = Path(settings.run.dir).absolute()
    if path.exists():
        raise Stop(Exit.RUN_EXISTS, f"run.dir {path} exists; choose another, or: wardround resume {path}")
    Bench().study(settings.plan)  # every name and parameter, before anything is written
    check_metric(settings.plan)
    if settings.plan.strategy.name in QUESTIONS:
        name = settings.plan.strategy.name
        raise Stop(Exit.CONFIG, f"strategy.name is {name!r}, which trains nothing; use: wardround {name}")
    federation = Federation.of(settings.data, settings.plan)
    if settings.data.plan == "auto":
        from server.fingerprint import keep as file_away
        from server.fingerprint import planned

        with planned(federation, settings) as (settings, made):
            folder = _prepared(path, settings, federation)
            file_away(made, path)
        return Simulation(folder, federation).run()
    return Simulation(_prepared(path, settings, federation), federation).run()


def _prepared(path: Path, settings: Settings, federation: Federation) -> RunFolder:
    """A new run's directory, once the plan is whole and was tried."""
    settings = settings.model_copy(update={"plan": calibrated(settings.plan)})
    federation.rehearse(settings.plan)
    if settings.plan.chooses_beside_privacy:
        note(
            "the choice by validation is exact, and in no ε: simulated sites may, real ones keep metrics home"
        )
    settings, first = begin(settings)
    return RunFolder.create(path, settings, initial=first)


def resume(path: Path) -> Path:
    """Go on with an interrupted run, to the same end; a finished one stays as it is.

    Raises:
        Stop: with the reason and its exit code.
    """
    folder = RunFolder.open(path.absolute())
    return Simulation(folder, Federation.of(folder.settings.data, folder.settings.plan)).run()


@dataclass(frozen=True)
class Federation:
    """Simulated sites: the cases of each by split, and the cache they are in."""

    cache: Cache
    sites: Mapping[str, Splits]

    @classmethod
    def of(cls, data: Data, plan: Plan) -> Federation:
        """Ingest `data.root` where that is not done yet, and deal its cases out.

        Raises:
            Stop: what `federate` raises, and fewer sites than are asked.
        """
        entries = cached(data)
        if data.folds and any(e.split for e in entries.entries):
            note(f"data.folds={data.folds}: the manifest's own split does not count")
        sites = narrowed(federate(entries.entries, data, entries.labels), data.annotates or {})
        for setting in ("cohort", "min_replies"):
            if (asked := getattr(plan.federation, setting)) > len(sites):
                raise Stop(Exit.CONFIG, f"federation.{setting} is {asked}; there are {len(sites)} sites")
        return cls(entries, sites)

    def rehearse(self, plan: Plan) -> None:
        """One forward pass over one case of each of a few sites, so that a misfit shows before the run does.

        Raises:
            Stop: (`CONFIG`) with what does not fit.
        """
        bench = Bench("cpu")
        study, _ = bench.study(plan)
        self._columns(study.task)
        model = bench.model(study)
        for name in list(self.sites)[:3]:
            case = self.cache.load(self.sites[name]["train"][0])
            try:
                batch = study.task.batch(
                    [study.task.prepare(case)] * 2, generator(0, name, 0, "", "rehearsal")
                )
                with torch.no_grad():
                    for phase in study.task.phases:
                        phase.loss(model, batch if phase.private else None)
            except (ValueError, RuntimeError) as error:
                why = str(error).splitlines()[0]
                raise Stop(Exit.CONFIG, f"the plan does not fit the cases of site {name}: {why}") from None
        bench.vet(plan, Archive(next(iter(self.sites.values())), self.cache.load))

    def _columns(self, task: Task) -> None:
        """Refuse columns that no case of any site has: a slip of the pen would read as all missing."""
        wanted = {setting: set(names) for setting, names in task.reads().items() if names}
        if not wanted:
            return
        every = (e for parts in self.sites.values() for part in parts.values() for e in part)
        have = frozenset().union(*(self.cache.columns(e) for e in every))
        for setting, names in wanted.items():
            if stray := sorted(names - have):
                known = ", ".join(sorted(have)) or "none"
                raise Stop(
                    Exit.CONFIG,
                    f"{setting} has {', '.join(stray)}; the cases have: {known} (data.columns.table)",
                )

    def site(self, name: str, folder: Path, bench: Bench, code: str) -> Site:
        """The named site, its files below `folder`.

        Every count may leave, and a stateless reply is not kept: a killed round is trained again.
        """
        archive = Archive(self.sites[name], self.cache.load)
        plans = Plans(folder / "plans")
        policy, ledger = (
            Policy(minimum_cell=1, patients_per_feature=0),
            Ledger(folder / name / "ledger.jsonl", None),
        )
        return Site(name, archive, policy, bench, plans, folder / name, code, durable=False, ledger=ledger)

    def merged(self, name: str, names: list[str]) -> Federation:
        """One site of the given name that holds the cases of several."""
        parts = {k: tuple(e for n in names for e in self.sites[n][k]) for k in ("train", "val", "test")}
        return Federation(self.cache, {name: parts})


@dataclass(frozen=True)
class Hospitals:
    """Makes a federation's sites; Ray sends it to its actors, each of which builds a bench of its own."""

    federation: Federation
    folder: Path
    device: str

    @cached_property
    def bench(self) -> Bench:
        """Shared by the sites of a process."""
        return Bench(self.device)

    def __call__(self, name: str) -> Site:
        return self.federation.site(name, self.folder, self.bench, code_digest())


def cached(data: Data) -> Cache:
    """The cache of `data.root`, brought up to date."""
    root = Path(data.root).absolute()
    folder = Path(data.cache).absolute() if data.cache else default_cache(root)
    with bar("ingest") as progress:
        report = ingest(
            root,
            Cache(folder),
            manifest=data.manifest,
            columns=data.columns,
            label_map=data.label_map,
            key=_KEY,
            workers=os.cpu_count() or 1,
            progress=progress,
            wait=True,
            released=Released(folder.parent / "state" / "released"),
        )
    for refused in report.refused:
        note(f"refused: {refused.source}: {refused.reason} ({refused.detail})")
    for name, cases in report.unmapped.items():
        note(f"label not mapped: {name} ({cases} cases)")
    for text, cases in report.notes.items():
        note(f"{text} ({cases} cases)")
    return Cache(folder).held()


@dataclass(frozen=True)
class Simulation:
    """A run directory, and the sites that train into it."""

    folder: RunFolder
    federation: Federation

    def run(self) -> Path:
        """Train, train what it is compared with, score everything."""
        with cluster(self.folder.settings.runtime):
            return self._run()

    def _run(self) -> Path:
        plan = self.folder.settings.plan
        recycle()
        torch.set_num_threads(plan.local.threads)
        if word := useless(plan, len(self.federation.sites)):
            note(word)
        self._train(self.federation, plan, self.folder.path, evaluate=True)
        self._promise()
        baselines = self._baselines()
        with self.opened() as run:
            run.metrics.add(self._compare(run, baselines))
        return self.folder.path

    @contextmanager
    def opened(self) -> Iterator[Run]:
        """The round loop over the sites, to ask them more."""
        sites, path, plan = self.federation, self.folder.path, self.folder.settings.plan
        with self._exchange(sites, path, plan) as link:
            yield self._loop(sites, plan, path, link)

    def ask(self, plan: Plan) -> None:
        """Rounds alone, nothing to compare with: for a plan that trains nothing."""
        self._train(self.federation, plan, self.folder.path, self._count(), evaluate=False)

    def _promise(self) -> None:
        """`privacy.json`, from the sites' ledgers: they hold more than planned where a round was repeated."""
        plan, made = self.folder.settings.plan, Hospitals(self.federation, self.folder.path / "sites", "cpu")
        if plan.privacy.mode == "central":
            keep(central_statement(plan, len(self.federation.sites)), self.folder.path)
        if plan.privacy.mode == "dpsgd":
            charged = {name: made(name).charged(self.folder.id) for name in self.federation.sites}
            keep(statement(plan, charged), self.folder.path)

    def _count(self) -> int:
        """One process a core; where sites are few, one a site: three sites then share two cores evenly."""
        cores, sites = os.cpu_count() or 1, len(self.federation.sites)
        return self.folder.settings.runtime.workers or (sites if sites <= 2 * cores else cores)

    def _exchange(self, federation: Federation, path: Path, plan: Plan, workers: int = 0) -> VirtualExchange:
        """What carries the round; `workers` other than 0: forked ones, whatever the runtime."""
        runtime = self.folder.settings.runtime
        hospitals = Hospitals(federation, path / "sites", runtime.device)
        if runtime.name == "ray" and not workers:
            from server.exchange.ray import RayExchange, room

            count = min(room(runtime), len(federation.sites))
            return RayExchange(hospitals, count, runtime.gpus_per_site, blobs=path / "blobs", seed=plan.seed)
        hospitals.bench.study(plan, initial(self.folder.path))  # before the fork: the workers share it
        return LocalExchange(
            hospitals, blobs=path / "blobs", seed=plan.seed, workers=workers or self._count()
        )

    def _loop(self, federation: Federation, plan: Plan, path: Path, exchange: VirtualExchange) -> Run:
        study, strategy = Bench().study(plan, initial(self.folder.path))
        return Run(
            study=study,
            strategy=strategy,
            sites=list(federation.sites),
            exchange=exchange,
            folder=path,
            id=self.folder.id,
            code=code_digest(),
            keep=self.folder.settings.run.keep,
        )

    def _train(
        self, federation: Federation, plan: Plan, path: Path, workers: int = 0, *, evaluate: bool
    ) -> None:
        with self._exchange(federation, path, plan, workers) as exchange:
            run = self._loop(federation, plan, path, exchange)
            for warning in run.warnings:
                note(warning)
            with bar(path.name) as progress:
                run.watch = lambda _, r: progress(r, plan.federation.rounds)
                run.train(evaluate=evaluate)

    def _compare(self, run: Run, baselines: Mapping[str, Tensors]) -> list[Line]:
        """Score what the federated model is held against; what an earlier go has scored is left out."""
        trivial = run.study.task.trivial() if "trivial" in self.folder.settings.baselines else ()
        lines: list[Line] = []
        for name in trivial:
            if not run.metrics.has(run.progress.round, name):
                lines += run.trivial(name, ("val", "test"))
        for name, model in baselines.items():
            if not run.metrics.has(run.progress.round, name):
                down = {"kind": "given", "model": model}
                lines += [line for part in ("val", "test") for line in run.score(name, down, part)]
        return lines

    def _baselines(self) -> dict[str, Tensors]:
        """Models trained on all cases at one place (`pooled`) and at each site by itself (`local:<site>`).

        The same plan under plain averaging, which over one site is plain training; as many at a time as
        there are cores.
        """
        asked, names = self.folder.settings.baselines, list(self.federation.sites)
        federations = {"pooled": self.federation.merged("pooled", names)} if "pooled" in asked else {}
        if "local" in asked:
            federations |= {f"local:{name}": self.federation.merged(name, [name]) for name in names}
        plan = self.folder.settings.plan
        rules = plan.federation.model_copy(
            update={
                "cohort": 0,
                "min_replies": 1,
                "round_timeout_s": 0.0,
                "choose": "last",
                "patience": 0,
            }
        )
        alone = plan.model_copy(update={"strategy": Section(name="fedavg"), "federation": rules})
        # with DP, one site of all patients has as many more of them as there are sites
        crowd = plan.privacy.model_copy(
            update={"nominal_patients": plan.privacy.nominal_patients * len(names)}
        )
        plans = dict.fromkeys(federations, alone)
        if "pooled" in plans:
            plans["pooled"] = alone.model_copy(update={"privacy": crowd})
        if plan.privacy.mode == "central":  # its unit is a site, and here is one
            plans = dict.fromkeys(federations, alone.model_copy(update={"privacy": Privacy()}))
        paths = {name: self.folder.path / "baselines" / name.replace(":", "-") for name in federations}
        once = {"evaluate": False}
        _side_by_side({n: (self._train, (f, plans[n], paths[n], 1), once) for n, f in federations.items()})
        models = {}
        for name, path in paths.items():
            progress, _ = latest(path / "checkpoints")
            if progress is None or progress.round < plan.federation.rounds:
                raise Stop(Exit.INTERNAL, f"the baseline {name} did not end; wardround resume repeats it")
            models[name] = progress.result
        return models


def _side_by_side(jobs: Mapping[str, tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]]) -> None:
    """Run functions in forked processes, as many at a time as there are cores.

    Raises:
        Stop: one of them failed; the others have ended.
    """
    context = multiprocessing.get_context("fork")
    waiting, running, failed = deque(jobs.items()), dict[int, tuple[str, BaseProcess]](), dict[str, int]()
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            name, (function, arguments, options) = waiting.popleft()
            job = partial(function, *arguments, **options)
            process: BaseProcess = context.Process(target=_alone, args=(job,), daemon=True)
            process.start()
            running[process.sentinel] = name, process
        for sentinel in wait(list(running)):
            name, process = running.pop(int(str(sentinel)))
            process.join()
            if process.exitcode:
                failed[name] = process.exitcode
    if failed:
        code = next((Exit(code) for code in failed.values() if code in HELP), Exit.INTERNAL)
        raise Stop(code, f"baseline {', '.join(failed)} failed; its error stands above")


def _alone(job: Callable[[], None]) -> None:
    """A forked process' work; whatever ends its parent ends it too."""
    die_with_parent()
    ended(job)
