"""Patients made up to be found again, put through a site's own private loop: what an audit of it looks at.

A canary's gradient is one coordinate of the model, so long that every step clips it: the worst patient that
the accountant allows for (the Dirac canaries of Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, section 5).
Each is there with probability one half, and whoever sees every noised gradient guesses which are. From the
draw of patients to the noise all is `Session.fit`: what is wrong there is wrong here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from client.budget import Purpose
from client.policy import Policy
from client.train import Archive, Bench, Session
from conf.schema import Plan, Privacy
from strategies.base import Study
from strategies.privacy.accountant import Entry as Charged
from strategies.privacy.dpsgd import Mechanism, steps
from strategies.protocol import Instruction
from tasks.base import Batch, Case, Phase, Prediction, Summed, Task
from tasks.data.cache import Entry
from tasks.metrics import Statistics
from tasks.seeds import generator

#: length of a canary's gradient before it is clipped, in clip norms
_LONG = 100.0


@dataclass(frozen=True)
class Replay:
    """What was seen of the canaries.

    Attributes:
        included: `m`, bool. scores: `m` float64, the logarithm of how much likelier it is that the canary was
            there, by what the plan promises: no other score tells more of a mechanism that keeps it.
        sums: `m` float64, of the noised gradients at each one's coordinate, in clip norms.
        charged: what the loop reserved. steps: of the replay. sigma: of one step, as planned.
    """

    included: Tensor
    scores: Tensor
    sums: Tensor
    charged: tuple[Charged, ...]
    steps: int
    sigma: float


def replay(
    plan: Plan, *, canaries: int, fits: int, seed: int, device: str, watch: Callable[[int, int], None]
) -> Replay:
    """Train the plan's model `fits` times in a row, as a site does round by round, on canaries alone.

    No patient is better for the attacker than canaries only, and a guarantee holds for any data. A clip
    norm that follows a quantile stands still: canaries are all beyond it.

    Args:
        canaries: how many; no more than the model has values. watch: called with fits done and all.
    """
    free = {"privacy": plan.privacy.model_copy(update={"adapt": Privacy().adapt})}
    # what would change the gradient after the noise, and memory: as many patients at once as a step draws
    chunk = plan.local.micro_chunk or plan.local.batch_size
    local = {"clip_norm": 0.0, "micro_chunk": chunk, "schedule": "constant"}
    plan = plan.model_copy(update={**free, "local": plan.local.model_copy(update=local)})
    study = Study.of(plan)
    planted = _Planted.of(study, canaries, seed)
    draw = generator(seed, "", 0, "audit", "included")
    included = torch.rand(planted.count, generator=draw) < 0.5
    archive = _archive(included)
    scores, sums = torch.zeros(2, planted.count, dtype=torch.float64)
    promised, charged = Mechanism.of(plan), list[Charged]()

    def observe(parameters: Mapping[str, nn.Parameter]) -> None:
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        for place in planted.seen(gradients):
            values = place.read(gradients) * (promised.expected / promised.clip)
            sums.add_(values)
            scores.add_(_likelier(values, promised))

    def charge(entry: Charged, _: Purpose) -> None:
        charged.append(entry)

    study, bench, weights = replace(study, task=planted), Bench(device), study.initial
    for fit in range(fits):
        asked = Instruction("audit", 1, 0, "train", "canaries", None, plan.digest, "", "")
        session = Session(bench, study, archive, Policy(minimum_cell=1), asked, {}, {}, charge)
        trained = session.fit(session.place(weights), correct=observe)
        weights = {name: tensor.clone() for name, tensor in trained.items()}
        watch(fit + 1, fits)
    total = fits * steps(plan, planted.phases)
    return Replay(included, scores, sums, tuple(charged), total, promised.sigma)


def _likelier(values: Tensor, promised: Mechanism) -> Tensor:
    """log of N(1, σ²) at rate q, else N(0, σ²), over N(0, σ²) alone."""
    shift = (2 * values - 1) / (2 * promised.sigma**2)
    rate = torch.tensor(promised.rate, dtype=torch.float64)
    return torch.logaddexp(torch.log1p(-rate), rate.log() + shift)


def _archive(included: Tensor) -> Archive:
    """The canaries that are there, one patient each."""
    entries = [
        Entry(str(i), f"canary-{i:06d}", None, "train", str(i), (1,), {}, str(i))
        for i in included.nonzero()[:, 0].tolist()
    ]

    def load(entry: Entry) -> Case:
        number = torch.tensor([float(entry.key)], dtype=torch.float64)
        return Case(entry.key, entry.patient, {"canary": number}, torch.eye(4).double(), (1.0,))

    return Archive({"train": entries}, load)


@dataclass(frozen=True)
class _Place:
    """Where the canaries of a phase sit: `m` each, the parameter's number and the place in it."""

    names: tuple[str, ...]
    which: Tensor
    where: Tensor

    def loss(self, model: nn.Module, batch: Batch | None, length: float) -> Tensor:
        """`length` times the canary's own coordinate: `B`."""
        if batch is None:
            raise ValueError("a phase that reads patients got none")
        live = dict(model.named_parameters())
        device = next(iter(live.values())).device
        canary = batch["canary"].to(device)[:, 0]
        which, where = self.which.to(device)[canary], self.where.to(device)[canary]
        total = torch.zeros(len(canary), device=device)
        for number, name in enumerate(self.names):
            here = which == number
            total = total + live[name].reshape(-1)[torch.where(here, where, 0)] * here
        return length * total

    def read(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """A step's gradient at each canary's coordinate: `m` float64."""
        values = torch.empty(len(self.which), dtype=torch.float64)
        for number, name in enumerate(self.names):
            here = (self.which == number).nonzero()[:, 0]
            flat = gradients[name].reshape(-1)
            values[here] = flat[self.where[here].to(flat.device)].double().cpu()
        return values


@dataclass(frozen=True)
class _Planted(Task):
    """The task of a plan with canaries for patients: its model, its phases' parameters, other losses."""

    inner: Task
    places: tuple[tuple[Phase, _Place], ...]
    count: int
    length: float

    @classmethod
    def of(cls, study: Study, canaries: int, seed: int) -> _Planted:
        model = study.fresh()
        reading = [phase for phase in study.task.phases if phase.private]
        sizes = [
            {n: p.numel() for n, p in model.named_parameters() if phase.parameters(n) and p.requires_grad}
            for phase in reading
        ]
        count = min(canaries, *(sum(one.values()) for one in sizes))
        draw = generator(seed, "", 0, "audit", "coordinates")
        places = []
        for phase, one in zip(reading, sizes, strict=True):
            ends = torch.tensor(list(one.values())).cumsum(0)
            flat = torch.randperm(int(ends[-1]), generator=draw)[:count]
            which = torch.searchsorted(ends, flat, right=True)
            where = flat - (ends - torch.tensor(list(one.values())))[which]
            places.append((phase, _Place(tuple(one), which, where)))
        return cls(study.task, tuple(places), count, _LONG * study.plan.privacy.clip)

    @property
    def phases(self) -> tuple[Phase, ...]:
        def bent(place: _Place) -> Callable[[nn.Module, Batch | None], Tensor]:
            return lambda model, batch: place.loss(model, batch, self.length)

        return tuple(replace(phase, loss=bent(place)) for phase, place in self.places)

    def seen(self, gradients: Mapping[str, Tensor]) -> list[_Place]:
        """The places of the phase that was stepped."""
        return [place for _, place in self.places if gradients.keys() >= set(place.names)]

    def build_model(self) -> nn.Module:
        return self.inner.build_model()

    def prepare(self, case: Case) -> dict[str, Tensor]:
        return {"canary": case.images["canary"].long()}

    def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> Batch:
        return {"canary": torch.stack([example["canary"] for example in examples])}

    def predict(self, model: nn.Module, case: Case) -> Prediction:
        raise NotImplementedError("nobody asks a canary")

    def score(self, cases: Sequence[Case], predictions: Sequence[Prediction]) -> Statistics:
        raise NotImplementedError("nobody asks a canary")

    def statistics(self) -> Statistics:
        return self.inner.statistics()

    def trivial(self) -> Mapping[str, Summed]:
        return {}
