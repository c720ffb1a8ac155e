"""What the algorithms compute, against closed forms and simulations by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from server.checkpoint import Progress
from server.exchange import Handler
from strategies.base import Study
from strategies.protocol import Failure, Instruction, Reply, Tree, Update
from tasks.base import Case
from tasks.seeds import generator
from tests.toys import Recorder, Toys, toy_cases, toy_plan

Cases = Mapping[str, Mapping[str, Sequence[Case]]]
Array = NDArray[np.float64]
FULL = {"batch_size": 0, "lr": 0.1}


def train(folder: Path, strategy: str, cases: Cases, /, **sections: Any) -> Progress:
    """Train a toy federation to the end, without evaluations."""
    with Toys(folder, toy_plan(strategy, **sections), cases).opened() as run:
        progress: Progress = run.train(evaluate=False)
    return progress


def point(progress: Progress) -> Array:
    """The quadratic's model."""
    return progress.model["w"].double().numpy()


def arrays(cases: Cases, site: str) -> tuple[Array, Array]:
    """Curvatures and targets of a site's training patients: `[patients, size]`."""
    a, t = torch.stack([case.images["image"] for case in cases[site]["train"]]).double().unbind(1)
    return a.numpy(), t.numpy()


def curvature(cases: Cases) -> tuple[Array, Array]:
    """Per site: curvature A and optimum T of its mean loss: `[sites, size]`."""
    pairs = [arrays(cases, site) for site in sorted(cases)]
    return np.stack([a.mean(0) for a, _ in pairs]), np.stack([(a * t).sum(0) / a.sum(0) for a, t in pairs])


def alike(sites: int = 3, patients: int = 5) -> Cases:
    """Sites of one size."""
    return {
        site: {**splits, "train": splits["train"][:patients]}
        for site, splits in toy_cases(sites, patients).items()
    }


# ---- FedAvg


def test_fedavg_with_one_full_batch_step_is_pooled_sgd(ram: Path) -> None:
    cases = toy_cases(3, 2)  # 2, 3 and 4 patients
    got = point(train(ram, "fedavg", cases, local={**FULL, "steps": 1}, federation={"rounds": 6}))
    a, t = (np.concatenate(parts) for parts in zip(*(arrays(cases, site) for site in cases), strict=True))
    w = np.zeros(3)
    for _ in range(6):
        w -= 0.1 * (a * (w - t)).mean(0)
    assert np.abs(got - w).max() < 1e-6


def test_that_holds_for_a_network_too(ram: Path) -> None:
    cases = toy_cases(3, 2)
    local, toy = {**FULL, "steps": 1}, {"norm": False}
    plan = toy_plan("fedavg", task="tiny_net", local=local, federation={"rounds": 4}, toy=toy)
    with Toys(ram, plan, cases).opened() as run:
        got = run.train(evaluate=False).model
    model = Study.of(plan).task.build_model()
    model.load_state_dict(Study.of(plan).initial)
    images = torch.stack([case.images["image"] for site in cases for case in cases[site]["train"]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        model(images[:, 0], images[:, 1]).mean().backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert (got[name] - tensor).abs().max() < 1e-6, name


# ---- SCAFFOLD

MANY = {"rounds": 22}


def test_scaffold_reaches_the_optimum_where_fedavg_stays_at_its_biased_fixed_point(ram: Path) -> None:
    cases, local = alike(), {**FULL, "steps": 10}
    a, t = curvature(cases)
    optimum = (a * t).sum(0) / a.sum(0)
    # K steps take site i from w to T + (1 - ηA)^K (w - T): its change is s (T - w), s = 1 - (1 - ηA)^K, and
    # where the mean of the changes is zero FedAvg stays
    s = 1 - (1 - 0.1 * a) ** 10
    biased = (s * t).sum(0) / s.sum(0)
    assert np.abs(optimum - biased).max() > 0.1
    scaffold = point(train(ram / "scaffold", "scaffold", cases, local=local, federation=MANY))
    fedavg = point(train(ram / "fedavg", "fedavg", cases, local=local, federation=MANY))
    assert np.abs(scaffold - optimum).max() < 1e-5
    assert np.abs(fedavg - biased).max() < 1e-5


def test_scaffolds_optimum_is_that_of_the_sites_mean_loss_whatever_their_sizes(ram: Path) -> None:
    cases = toy_cases(3, 2)  # 2, 3 and 4 patients
    a, t = curvature(cases)
    got = point(train(ram, "scaffold", cases, local={**FULL, "steps": 10}, federation=MANY))
    assert np.abs(got - (a * t).sum(0) / a.sum(0)).max() < 1e-5


def test_fedprox_is_pulled_to_the_rounds_model(ram: Path) -> None:
    cases, mu = toy_cases(3, 2), 0.7
    a, t = curvature(cases)
    sizes = np.array([[len(cases[site]["train"])] for site in cases])
    sections = {"local": {**FULL, "steps": 4}, "federation": {"rounds": 2}, "strategy": {"mu": mu}}
    w = np.zeros(3)
    for _ in range(2):
        # the local loss is ½ A (y - T)² + ½ μ (y - w)²
        centre = (a * t + mu * w) / (a + mu)
        w = w + (sizes * (1 - (1 - 0.1 * (a + mu)) ** 4) * (centre - w)).sum(0) / sizes.sum()
    assert np.abs(point(train(ram, "fedprox", cases, **sections)) - w).max() < 1e-6


# ---- Ditto


def test_dittos_personal_model_follows_its_closed_form(ram: Path) -> None:
    cases, lam = toy_cases(2, 2), 0.5
    a, t = curvature(cases)
    sizes = np.array([[2.0], [3.0]])
    with Toys(
        ram,
        toy_plan("ditto", local={**FULL, "steps": 3}, federation={"rounds": 2}, strategy={"lam": lam}),
        cases,
    ).opened() as run:
        run.train()
    told = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    got = [line for line in told if line["split"] == "test"]
    w, v = np.zeros(3), np.zeros((2, 3))
    for _ in range(2):
        centre = (a * t + lam * w) / (a + lam)
        v = centre + (1 - 0.1 * (a + lam)) ** 3 * (v - centre)  # from v, pulled to this round's w
        w = w + (sizes * (1 - (1 - 0.1 * a) ** 3) * (t - w)).sum(0) / sizes.sum()
    assert np.abs(point(run.progress) - w).max() < 1e-6
    for i, site in enumerate(sorted(cases)):
        images = torch.stack([case.images["image"] for case in cases[site]["test"]]).double().numpy()
        loss = (0.5 * images[:, 0] * (v[i] - images[:, 1]) ** 2).sum(-1).mean()
        (line,) = [line for line in got if line["model"] == f"personal:{site}"]
        assert line["loss"] == pytest.approx(loss, abs=1e-5)


# ---- FedAdam


def test_one_round_of_fedadam(ram: Path) -> None:
    cases = toy_cases(3, 2)
    a, t = curvature(cases)
    sizes = np.array([[len(cases[site]["train"])] for site in cases])
    delta = (sizes * (1 - (1 - 0.1 * a) ** 4) * t).sum(0) / sizes.sum()
    settings = {"lr": 0.3, "beta1": 0.8, "beta2": 0.9, "tau": 0.05}
    got = train(
        ram, "fedadam", cases, local={**FULL, "steps": 4}, federation={"rounds": 1}, strategy=settings
    )
    m, v = 0.2 * delta, 0.9 * 0.05**2 + 0.1 * delta**2
    assert np.abs(point(got) - 0.3 * m / (np.sqrt(v) + 0.05)).max() < 1e-6
    assert np.abs(got.state["m"]["w"].numpy() - m).max() < 1e-6
    assert np.abs(got.state["v"]["w"].numpy() - v).max() < 1e-6


def test_fedadam_takes_running_statistics_by_their_plain_mean(ram: Path) -> None:
    sections = {"task": "tiny_net", "federation": {"rounds": 1}}
    adam = train(ram / "adam", "fedadam", toy_cases(), **sections)
    mean = train(ram / "mean", "fedavg", toy_cases(), **sections)
    for name, tensor in mean.model.items():
        assert adam.model[name].equal(tensor) == ("running" in name), name
    assert not any("running" in name for name in adam.state["m"])


# ---- cyclic


class Broken:
    """A site that always fails."""

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        if instruction.stage == "plan":
            return Reply(instruction.site, Update({}))
        return Reply(instruction.site, Failure("data"))


@pytest.mark.parametrize("broken", [None, "site_1"])
def test_cyclic_transfer_visits_the_sites_in_order_and_passes_over_one_that_fails(
    ram: Path, broken: str | None
) -> None:
    cases = toy_cases(3, 2)
    a, t = curvature(cases)
    plan = toy_plan("cyclic", local={**FULL, "steps": 3}, federation={"rounds": 2, "min_replies": 2})

    def wrap(site: Handler, name: str) -> Handler:
        return Broken() if name == broken else site

    with Toys(ram, plan, cases, wrap=wrap).opened() as run:
        got = point(run.train(evaluate=False))
    w = np.zeros(3)
    for _ in range(2):
        for i, site in enumerate(sorted(cases)):
            if site != broken:
                w = t[i] + (1 - 0.1 * a[i]) ** 3 * (w - t[i])
    assert np.abs(got - w).max() < 1e-6


# ---- what the sites really said, put together by hand


def recorded(folder: Path, strategy: str, cases: Cases, /, **sections: Any) -> tuple[list[Said], list[Array]]:
    """All answers to training asks in the order of folding, and the model before and after every round."""
    said: list[tuple[Instruction, Tree, Reply]] = []
    toys = Toys(folder, toy_plan(strategy, **sections), cases)
    toys.wrap = lambda site, name: Recorder(site, said)
    models: list[Array] = []

    def watch(event: str, r: int) -> None:
        if event in ("start", "checkpoint") and (event == "checkpoint" or r == 1):
            models.append(point(run.progress))
            rounds.append(len(said))

    rounds: list[int] = []
    with toys.opened(watch) as run:
        run.train(evaluate=False)
    folded = [
        (r, instruction, common, reply.body.tensors["delta/w"].double().numpy(), reply.body.weight)
        for r in range(1, len(rounds))
        for instruction, common, reply in said[rounds[r - 1] : rounds[r]]
        if isinstance(reply.body, Update)
    ]
    return folded, models


Said = tuple[int, Instruction, Tree, Array, int]


@pytest.mark.parametrize("sites", [3, 4])
def test_the_median_is_numpys_of_what_the_sites_said(ram: Path, sites: int) -> None:
    folded, models = recorded(ram, "median", toy_cases(sites, 3))
    for r, said in groupby(folded, lambda one: one[0]):
        deltas = np.stack([delta for _, _, _, delta, _ in said])
        assert len(deltas) == sites
        assert np.abs(models[r] - models[r - 1] - np.median(deltas, axis=0)).max() < 1e-6


def test_fedbuff_counts_answers_by_their_age_as_a_simulation_by_hand_does(ram: Path) -> None:
    cases, rounds, buffer, power, seed = toy_cases(5, 2), 6, 2, 0.5, 7
    folded, models = recorded(
        ram,
        "fedbuff",
        cases,
        federation={"rounds": rounds},
        strategy={"buffer": buffer, "power": power},
    )
    by_round = {r: list(said) for r, said in groupby(folded, lambda one: one[0])}
    clock, jobs = 0.0, dict[str, tuple[float, int]]()  # site: when it is done, and the round it began in
    ages = set()
    for r in range(1, rounds + 1):
        for site in sorted(cases):
            if site not in jobs:
                draw = generator(seed, site, r, "train", "duration")
                lasts = math.exp(0.5 * float(torch.randn((), generator=draw, dtype=torch.float64)))
                jobs[site] = clock + lasts, r
        first = sorted(jobs, key=lambda site: jobs[site])[:buffer]
        clock = max(jobs[site][0] for site in first)
        said = by_round[r]
        assert sorted(one[1].site for one in said) == sorted(first)
        shares = []
        for _, instruction, common, _, weight in said:
            began = jobs.pop(instruction.site)[1]
            assert instruction.round == began
            assert np.allclose(common["model"]["w"].double().numpy(), models[began - 1], atol=1e-7)
            assert weight == len(cases[instruction.site]["train"])
            shares.append(weight * round(256 * (1 + r - began) ** -power) / 256)
            ages.add(r - began)
        mean = sum(s * one[3] for s, one in zip(shares, said, strict=True)) / sum(shares)
        assert np.abs(models[r] - models[r - 1] - mean).max() < 1e-6
    assert {0, 1, 2} <= ages
