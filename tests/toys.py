"""Tiny tasks with known answers, and a federation of them in memory: what the laws are tested on."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from client.policy import Policy
from client.site import Ledger, Plans, Site
from client.train import Archive, Bench
from conf.schema import Plan, Section
from conf.table import STRICT
from server.exchange import Handler
from server.exchange.local import LocalExchange
from server.rounds import Run
from strategies.code import code_digest
from strategies.protocol import Instruction, Reply, Tree
from tasks.base import Batch, Case, Phase, Prediction, Summed, Task
from tasks.data.cache import Entry
from tasks.metrics import Statistics
from tasks.scoring.classes import KINDS

TOYS = {
    "quadratic": "tests.toys:Quadratic",
    "tiny_net": "tests.toys:TinyNet",
    "scored": "tests.toys:Scored",
}


@dataclass(frozen=True)
class MeanLoss(Statistics):
    """Sum over patients of the loss."""

    loss: Tensor
    count: Tensor

    def value(self) -> dict[str, float]:
        return {"loss": float(self.loss / self.count)} if self.count else {}

    @property
    def patients(self) -> int:
        return int(self.count)

    def bounds(self) -> dict[str, float]:
        return {"loss": 4.0, "count": 1.0}


@dataclass(frozen=True)
class MeanTarget(Summed):
    """Predicts the mean target."""

    size: int

    def zero(self) -> dict[str, Tensor]:
        return {
            "target": torch.zeros(self.size, dtype=torch.float64),
            "count": torch.zeros((), dtype=torch.float64),
        }

    def accumulate(self, case: Case, known: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"target": case.images["image"][1].double(), "count": torch.ones((), dtype=torch.float64)}

    def predict(self, known: Mapping[str, Tensor], case: Case) -> Prediction:
        return Prediction(scores={"w": known["target"] / known["count"]})


class _Point(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))

    def forward(self, a: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (a * (self.w - t) ** 2).sum(-1)


@dataclass(frozen=True)
class Quadratic(Task):
    """min over w of the mean of ½ Σ a (w − t)²; the pooled optimum is Σ a t / Σ a, in each coordinate."""

    __pydantic_config__ = STRICT
    model: Section
    loss: Section
    size: int = 3

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (
            Phase("train", lambda model, batch: model(batch["a"], batch["t"]) if batch else torch.zeros(0)),
        )

    def build_model(self) -> nn.Module:
        return _Point(self.size)

    def prepare(self, case: Case) -> dict[str, Tensor]:
        return {"a": case.images["image"][0], "t": case.images["image"][1]}

    def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def predict(self, model: nn.Module, case: Case) -> Prediction:
        return Prediction(scores={"w": dict(model.named_parameters())["w"].detach()})

    def score(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        losses = [
            0.5 * (c.images["image"][0] * (p.scores["w"] - c.images["image"][1]) ** 2).sum().double()
            for c, p in zip(cases, predictions, strict=True)
        ]
        return MeanLoss(torch.stack(losses).mean(), torch.ones((), dtype=torch.float64))

    def statistics(self) -> Statistics:
        return MeanLoss(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))

    def trivial(self) -> Mapping[str, Summed]:
        return {"constant": MeanTarget(self.size)}


class _Net(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        # float buffers travel, the integer one (num_batches_tracked) does not
        middle: list[nn.Module] = [nn.BatchNorm1d(4)] if norm else []
        self.layers = nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 3))

    def forward(self, a: Tensor, t: Tensor) -> Tensor:
        difference: Tensor = self.layers(a) - t
        return difference.square().mean(-1)


@dataclass(frozen=True)
class TinyNet(Quadratic):
    """A small network with normalisation layers, on the same cases."""

    norm: bool = True

    def build_model(self) -> nn.Module:
        return _Net(self.norm)

    def predict(self, model: nn.Module, case: Case) -> Prediction:
        with torch.no_grad():
            return Prediction(scores={"w": model.eval().layers(case.images["image"][0][None])[0]})  # type: ignore[operator]


@dataclass(frozen=True)
class Scored(Quadratic):
    """Scored like two classes: whether a patient's first target is positive, by what is predicted of it."""

    def score(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        truth = torch.stack([c.images["image"][1][0] > 0 for c in cases])
        w = torch.stack([p.scores["w"] for p in predictions]).double()
        p = (w * torch.stack([c.images["image"].sum(0) for c in cases])).sum(1).sigmoid()
        return KINDS["classes"].of_patient(cases[0].patient, truth, torch.stack([1 - p, p], 1))

    def statistics(self) -> Statistics:
        return KINDS["classes"].zero(2)


def toy_plan(strategy: str = "fedavg", /, *, task: str = "quadratic", **sections: dict[str, Any]) -> Plan:
    """A plan over a toy; sections by name (`local`, `privacy`, …), `toy` holds the task's own."""
    return Plan(
        task=Section(name=task, **sections.get("toy", {})),
        model=Section(name="none"),
        loss=Section(name="none"),
        strategy=Section(name=strategy, **sections.get("strategy", {})),
        local={"optimizer": "sgd", "lr": 0.1, "steps": 4, "batch_size": 2, **sections.get("local", {})},
        federation={"rounds": 3, **sections.get("federation", {})},
        privacy=sections.get("privacy", {}),
        seed=7,
    )


def toy_cases(
    sites: int = 3, patients: int = 5, size: int = 3, seed: int = 0
) -> dict[str, dict[str, list[Case]]]:
    """Cases by site and split: each site has its own curvatures and targets."""
    draw = torch.Generator().manual_seed(seed)
    made: dict[str, dict[str, list[Case]]] = {}
    for s in range(sites):
        centre = 2 * torch.randn(size, generator=draw)
        made[f"site_{s}"] = {
            split: [
                toy_case(
                    f"{s}{split}{p}",
                    0.5 + (s + 1) * torch.rand(size, generator=draw),
                    centre + 0.3 * torch.randn(size, generator=draw),
                )
                for p in range(patients + s if split == "train" else 2)
            ]
            for split in ("train", "val", "test")
        }
    return made


def toy_case(key: str, a: Tensor, t: Tensor) -> Case:
    return Case(key, f"patient-{key}", {"image": torch.stack([a, t])}, torch.eye(4).double(), (1.0,))


def toy_archive(splits: Mapping[str, Sequence[Case]]) -> Archive:
    """A site's archive of cases in memory."""
    held = {case.key: case for cases in splits.values() for case in cases}
    entries = {
        split: [
            Entry(c.key, c.patient, None, split, c.key, tuple(c.images["image"].shape), {}, c.key)
            for c in cases
        ]
        for split, cases in splits.items()
    }
    return Archive(entries, lambda entry: held[entry.key])


Wrap = Callable[[Handler, str], Handler]


@dataclass
class Toys:
    """A federation of toys below a folder.

    Attributes:
        wrap: puts something in front of a site: a fault, a recorder. given: finds the plan's first weights.
    """

    folder: Path
    plan: Plan
    cases: Mapping[str, Mapping[str, Sequence[Case]]]
    workers: int = 1
    durable: bool = False
    wrap: Wrap = lambda site, name: site
    run_id: str = "run"
    given: Callable[[str], object] | None = None

    def site(self, name: str, bench: Bench | None = None) -> Site:
        sites = self.folder / "sites"
        return Site(
            name=name,
            archive=toy_archive(self.cases[name]),
            policy=Policy(minimum_cell=1, patients_per_feature=0),
            bench=bench or Bench("cpu"),
            plans=Plans(sites / "plans"),
            folder=sites / name,
            code=code_digest(),
            durable=self.durable,
            ledger=Ledger(sites / name / "ledger.jsonl", None),
        )

    @contextmanager
    def opened(self, watch: Callable[[str, int], None] = lambda *_: None) -> Any:
        """The round loop, ready to train or to go on."""
        torch.set_num_threads(1)
        bench = Bench("cpu")
        study, strategy = bench.study(self.plan, self.given)
        with LocalExchange(
            lambda name: self.wrap(self.site(name, bench), name),
            blobs=self.folder / "blobs",
            seed=self.plan.seed,
            workers=self.workers,
        ) as exchange:
            yield Run(
                study,
                strategy,
                list(self.cases),
                exchange,
                self.folder,
                self.run_id,
                code_digest(),
                watch=watch,
            )

    def train(self, watch: Callable[[str, int], None] = lambda *_: None) -> dict[str, Tensor]:
        """Train to the end; returns the model."""
        with self.opened(watch) as run:
            model: dict[str, Tensor] = run.train().model
        return model

    def ending(self) -> dict[str, bytes]:
        """What two equal runs share: the last checkpoint and the metrics."""
        last = sorted((self.folder / "checkpoints").glob("round-*"))[-1]
        files = [*sorted(last.iterdir()), self.folder / "metrics.jsonl"]
        return {path.name: path.read_bytes() for path in files}


@dataclass(frozen=True)
class Recorder:
    """A site that notes what passes through it, but for the plan."""

    site: Handler
    said: list[tuple[Instruction, Tree, Reply]]

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        reply = self.site.handle(instruction, common)
        if instruction.stage != "plan":
            self.said.append((instruction, common, reply))
        return reply


@dataclass(frozen=True)
class Fatal:
    """Kills its own process when it is to train in round 2, while `marks` holds fewer than `times` files."""

    site: Handler
    marks: Path
    times: int = 1

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        if instruction.round == 2 and instruction.stage.startswith("train"):
            before = len(list(self.marks.iterdir()))
            if before < self.times:
                (self.marks / str(before)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.site.handle(instruction, common)


__all__ = ["Fatal", "Recorder", "Toys", "replace", "toy_case", "toy_cases", "toy_plan"]
