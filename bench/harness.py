"""The comparison's workloads (its module `common`: data, models, cohorts, steps) as a task and a strategy.

What trains, folds and checkpoints them is the product; here stands only what differs from one of its
own tasks: where the data come from, in which order batches are taken, and who is asked in a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import common
import torch
from torch import Tensor, nn

from client.policy import Policy
from client.site import Archive, Bench, Plans, Site
from conf.schema import Plan, Section
from conf.table import STRICT
from strategies import STRATEGIES
from strategies.base import Local, Round, Study, Tensors
from strategies.mean import FedAvg
from strategies.protocol import Tree, Update
from tasks import TASKS
from tasks.base import Batch, Case, Phase, Prediction, Summed, Task
from tasks.data.cache import Entry
from tasks.metrics import Statistics

TASKS._entries["harness"] = "harness:Workload"
STRATEGIES._entries["harness"] = "harness:Averaging"


def name(client: int) -> str:
    return f"site-{client:06d}"


def client(site: str) -> int:
    return int(site.partition("-")[2])


def plan(work: str) -> Plan:
    """A workload as a plan."""
    given = common.WORK[work]
    return Plan(
        task=Section(name="harness", work=work),
        model=Section(name="none"),
        loss=Section(name="none"),
        strategy=Section(name="harness", work=work),
        local={
            "optimizer": "sgd",
            "lr": given["lr"] or 1.0,
            "steps": given["n"] // given["batch"],
            "batch_size": given["batch"],
        },
        federation={"rounds": given["rounds"], "cohort": given["cohort"], "evaluate_every": 0},
    )


@dataclass(frozen=True)
class Workload(Task):
    """A workload of the comparison."""

    __pydantic_config__ = STRICT
    model: Section
    loss: Section
    work: str

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("train", self._loss),)

    def _loss(self, model: nn.Module, batch: Batch | None) -> Tensor:
        if batch is None:
            raise ValueError("the phase is private")
        # the harness' loss is a mean over the batch; all batches are of one size
        return common.loss_fn(self.work, model(batch["x"]), batch["y"])[None]

    def build_model(self) -> nn.Module:
        made: nn.Module = common.build(self.work)
        return made

    def prepare(self, case: Case) -> dict[str, Tensor]:
        return dict(case.images)

    def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
        """The site's next examples in the harness' order, stacked one by one like any task's.

        The local loop shuffles; the harness does not. So each example holds the site's whole data and a
        place in them, and who was drawn does not matter.
        """
        first = examples[0]
        at, count = int(first["at"]), len(examples)
        first["at"].fill_((at + count) % len(first["x"]))
        return {
            key: torch.stack([example[key][at + i] for i, example in enumerate(examples)]) for key in "xy"
        }

    def predict(self, model: nn.Module, case: Case) -> Prediction:
        raise NotImplementedError("the harness scores")

    def score(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        raise NotImplementedError("the harness scores")

    def statistics(self) -> Statistics:
        raise NotImplementedError("the harness scores")

    def trivial(self) -> Mapping[str, Summed]:
        return {}


@dataclass(frozen=True)
class Averaging(FedAvg):
    """FedAvg over the harness' cohorts. Its workload w4 trains nothing: it adds what is known."""

    __pydantic_config__ = STRICT
    work: str = "w1"

    def round(self, r: int, state: Tree, model: Tensors, study: Study, sites: tuple[str, ...]) -> Round:
        chosen = tuple(sorted(name(k) for k in common.cohort(self.work, r - 1)))
        return super().round(r, state, model, study, chosen)

    def learn(self, local: Local) -> tuple[Update, Tree | None]:
        if self.work != "w4":
            return super().learn(local)
        start = self.weights(local)
        moved = {key: value + 1e-3 * client(local.site) for key, value in start.items()}
        return self.report(local, start, moved), None


@lru_cache(256)
def _tensors(work: str, number: int) -> dict[str, Tensor]:
    x, y = common.data(work, number)
    return {"x": x, "y": y, "at": torch.zeros((), dtype=torch.int64)}


@dataclass(frozen=True)
class Hospitals:
    """Makes the workload's sites: every example is a patient."""

    work: str
    folder: Path
    code: str

    @cached_property
    def bench(self) -> Bench:
        return Bench("cpu")

    @cached_property
    def plans(self) -> Plans:
        return Plans(self.folder / "plans")

    def __call__(self, site: str) -> Site:
        entries = tuple(
            Entry(key, key, site, "train", key, (), {}, key)
            for key in (f"{site}-{i}" for i in range(common.WORK[self.work]["n"]))
        )
        return Site(
            name=site,
            archive=Archive({"train": entries}, lambda _: self._case(site)),
            policy=Policy(minimum_cell=1),
            bench=self.bench,
            plans=self.plans,
            folder=self.folder / site,
            code=self.code,
            durable=False,
        )

    def _case(self, site: str) -> Case:
        return Case(site, site, _tensors(self.work, client(site)), torch.eye(4), ())
