"""Sites that train nothing: a task of one tensor and a strategy that adds a known amount to it.

What a deployed round costs beyond its training is all that is left. `python -m bench.idle site FOLDER NAME
SOCKET` is a site's trainer, every other call the coordinator; both are the product's own.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from conf.schema import Plan, Section
from conf.table import STRICT
from strategies import STRATEGIES
from strategies.base import Local, Tensors
from strategies.mean import FedAvg
from strategies.protocol import Tree, Update
from tasks import TASKS
from tasks.base import Batch, Case, Phase, Prediction, Summed, Task
from tasks.data.cache import Entry
from tasks.metrics import Statistics

TASKS._entries["idle"] = "bench.idle:Idle"
STRATEGIES._entries["idle"] = "bench.idle:Adding"
STEP = 0.001

#: where a site notes its trainings and finds how long they take; set by `main`
folder = Path()


def plan(megabytes: float, rounds: int, **federation: float) -> Plan:
    """A plan whose model is of so many megabytes (10^6 bytes)."""
    return Plan(
        task=Section(name="idle", size=int(megabytes * 1e6) // 4),
        model=Section(name="none"),
        loss=Section(name="none"),
        strategy=Section(name="idle"),
        federation={"rounds": rounds, "evaluate_every": 0, **federation},
    )


@dataclass(frozen=True)
class Nothing(Statistics):
    """Patients, counted."""

    count: Tensor

    def value(self) -> dict[str, float]:
        return {}

    @property
    def patients(self) -> int:
        return int(self.count)


@dataclass(frozen=True)
class Idle(Task):
    """One tensor of zeros."""

    __pydantic_config__ = STRICT
    model: Section
    loss: Section
    size: int

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase("train", lambda *_: torch.zeros(1)),)

    def build_model(self) -> nn.Module:
        made = nn.Module()
        made.register_parameter("w", nn.Parameter(torch.zeros(self.size)))
        return made

    def prepare(self, case: Case) -> dict[str, Tensor]:
        return {}

    def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
        return {}

    def predict(self, model: nn.Module, case: Case) -> Prediction:
        return Prediction(scores={})

    def score(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Nothing:
        return Nothing(torch.ones((), dtype=torch.float64))

    def statistics(self) -> Nothing:
        return Nothing(torch.zeros((), dtype=torch.float64))

    def trivial(self) -> Mapping[str, Summed]:
        return {}


@dataclass(frozen=True)
class Adding(FedAvg):
    """Adds `STEP`, after as many seconds as `orders.json` has for the round; notes when."""

    __pydantic_config__ = STRICT

    def learn(self, local: Local) -> tuple[Update, Tree | None]:
        began = time.time()
        with (folder / f"{local.site}.begun").open("a") as file:
            file.write(f"{local.round}\n")
        try:
            orders = json.loads((folder / "orders.json").read_text())
        except FileNotFoundError:
            orders = {}
        until = time.monotonic() + orders.get(str(local.round), 0.0)
        while time.monotonic() < until:
            local._bench.halt()  # type: ignore[attr-defined]
            time.sleep(0.02)
        start = self.weights(local)
        trained: Tensors = {name: tensor + STEP for name, tensor in start.items()}
        with (folder / f"{local.site}.trained").open("a") as file:
            file.write(f"{local.round} {time.time() - began}\n")
        return self.report(local, start, trained), None


def site(name: str, socket: Path) -> None:
    """Serve a site of two patients."""
    from client.policy import Policy
    from client.site import Plans, Site
    from client.train import Archive, Bench
    from client.trainer import leave_network, serve
    from strategies.code import code_digest

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    leave_network()
    keys = [f"{name}-{i}" for i in range(2)]
    entries = {
        part: tuple(Entry(k, k, None, part, k, (), {}, k) for k in keys) for part in ("train", "val", "test")
    }
    archive = Archive(entries, lambda e: Case(e.key, e.patient, {}, torch.eye(4).double(), ()))
    bench = Bench("cpu")
    plans = Plans(folder / name / "plans")
    policy = Policy(minimum_cell=1)
    serve(Site(name, archive, policy, bench, plans, folder / name, code_digest()), bench, socket)


def main() -> None:
    if sys.argv[1] == "site":
        from bench import idle

        idle.folder = Path(sys.argv[2])
        idle.site(sys.argv[3], Path(sys.argv[4]))
        return
    from server.coordinator import main as coordinate

    coordinate()


if __name__ == "__main__":
    main()
