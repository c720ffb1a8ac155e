"""Central DP: what a site sends, what the coordinator adds, what it divides by, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conf.exits import Exit, Stop
from conf.schema import Plan
from server.checkpoint import latest
from server.privacy import calibrated, central_statement, useless
from strategies import STRATEGIES, build_strategy
from strategies.base import Study
from strategies.privacy import noise
from strategies.privacy.accountant import Entry, prv
from strategies.privacy.central import Central, entry
from strategies.protocol import Refused, Update
from tests.toys import Toys, toy_cases, toy_plan

SITES = 3


def central(strategy: str = "fedavg", /, *, rounds: int = 1, task: str = "quadratic", **privacy: Any) -> Plan:
    return toy_plan(
        strategy,
        task=task,
        toy={"norm": False} if task == "tiny_net" else {},
        federation={"weight": "equal", "rounds": rounds},
        privacy={"mode": "central", "sigma": 1.0, "clip": 0.5, **privacy},
    )


def plain(plan: Plan) -> Plan:
    return plan.model_copy(update={"privacy": toy_plan().privacy})


def noised_by(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    monkeypatch.setattr(noise, "normal", lambda n: torch.full((n,), value, dtype=torch.float64))


def trained(folder: Path, plan: Plan) -> dict[str, Tensor]:
    folder.mkdir()
    return Toys(folder, plan, toy_cases(SITES)).train()


def deltas(folder: Path, plan: Plan) -> list[Tensor]:
    """What each site alone would change, without privacy."""
    cases, start = toy_cases(SITES), Study.of(plan).initial["w"]
    folder.mkdir()
    made = []
    for name in cases:
        one = Toys(folder / name, plain(plan), {name: cases[name]})
        (folder / name).mkdir()
        made.append(one.train()["w"] - start)
    return made


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_a_round_is_the_clipped_sum_noised_once_over_the_sites_asked(
    shift: float, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noised_by(monkeypatch, shift)
    plan = central(clip=0.5, sigma=0.8)
    each = deltas(ram / "each", plan)
    assert any(float(d.norm()) > 0.5 for d in each)
    clipped = [d.double() * min(1.0, 0.5 / float(d.norm())) for d in each]
    expected = (torch.stack(clipped).sum(0) + shift * 0.8 * 0.5) / SITES
    got = trained(ram / "got", plan)["w"] - Study.of(plan).initial["w"]
    assert torch.allclose(got.double(), expected, atol=1e-6)


@pytest.mark.parametrize("strategy", ["fedavg", "fedprox", "fedadam", "fedbn"])
def test_without_noise_and_below_the_clip_it_is_the_algorithm(
    strategy: str, ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noised_by(monkeypatch, 0.0)
    plan = central(strategy, rounds=2, task="tiny_net", clip=1e3)
    got, wanted = trained(ram / "central", plan), trained(ram / "plain", plain(plan))
    assert all(torch.allclose(got[name], wanted[name], atol=1e-6) for name in wanted)


def test_a_reply_fewer_does_not_change_the_divisor(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noised_by(monkeypatch, 0.0)
    plan = central(clip=0.01)
    study, strategy = Study.of(plan), build_strategy(plan)
    start = strategy.start(study, ("a", "b"))
    steps = strategy.round(1, start, study.initial, study, ("a", "b"))
    ask = next(steps)
    partial = ask.fold.start(ask.spec)
    update = Update({"delta/w": torch.tensor([0.01, 0.0, 0.0])})
    ask.spec.check(update)
    ask.fold.add(partial, ask.spec, "a", (1, 0), update)
    with pytest.raises(StopIteration) as end:
        steps.send(ask.fold.finish(partial, ask.spec))
    assert torch.allclose(end.value.value[0]["w"] - study.initial["w"], torch.tensor([0.005, 0.0, 0.0]))


def test_noise_has_the_planned_deviation(ram: Path) -> None:
    plan = central(clip=0.5, sigma=2.0)
    study, strategy = Study.of(plan), build_strategy(plan)
    assert isinstance(strategy, Central)
    found = []
    for _ in range(400):
        ask = next(strategy.round(1, strategy.start(study, ("a",)), study.initial, study, ("a",)))
        partial = ask.fold.start(ask.spec)
        ask.fold.add(partial, ask.spec, "a", (1, 0), Update({"delta/w": torch.zeros(3)}))
        found.append(strategy._noised(ask.fold.finish(partial, ask.spec), 0.5, 4).mean("delta")["w"])
    assert float(torch.stack(found).std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.11)  # five deviations


def test_both_ends_hold_an_update_against_the_norm() -> None:
    plan = central(clip=0.5)
    study, strategy = Study.of(plan), build_strategy(plan)
    spec = strategy.spec(study, "train")
    spec.check(Update({"delta/w": torch.tensor([0.3, 0.4, 0.0])}))
    for wrong in ([0.3, 0.40001, 0.0], [0.5, 0.5, 0.5]):
        with pytest.raises(Refused, match=r"range: delta has norm"):
            spec.check(Update({"delta/w": torch.tensor(wrong)}))
    with pytest.raises(Refused, match="weight"):
        spec.check(Update({"delta/w": torch.zeros(3)}, weight=2))
    assert not strategy.spec(study, "evaluate/federated/val").norms


def test_the_norm_follows_the_updates(ram: Path) -> None:
    adapt = {"quantile": 0.5, "rate": 0.5, "count_noise": 1.0}
    plan = central(rounds=25, clip=100.0, sigma=0.05, adapt=adapt)
    trained(ram / "run", plan)
    progress, _ = latest(ram / "run" / "checkpoints")
    assert progress is not None
    assert progress.state["clip"] < 10.0
    study, strategy = Study.of(plan), build_strategy(plan)
    ask = next(strategy.round(1, {"inner": {}, "clip": 3.0}, study.initial, study, ("a",)))
    assert ask.spec.norms == {"delta": 3.0, "inside": 0.5}
    assert ask.down["clip"] == 3.0


WRAPPED = ("fedavg", "fedprox", "fedbn", "fedper", "fedadam", "ditto")


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_algorithm_is_wrapped_or_refused_with_the_reason(name: str) -> None:
    plan = central(name)
    if name not in WRAPPED:
        with pytest.raises(Stop, match="central") as stop:
            build_strategy(plan)
        assert stop.value.exit is Exit.CONFIG
        return
    built = build_strategy(plan)
    assert isinstance(built, Central)
    assert set(built.groups(Study.of(plan))) == {"delta"}


def test_statistics_of_batches_are_refused() -> None:
    plan = central(task="tiny_net").model_copy(update={"task": toy_plan(task="tiny_net").task})
    with pytest.raises(
        Stop, match=r"'central', but the model keeps statistics of its batches in layers\.1\.run"
    ):
        build_strategy(plan).check(Study.of(plan))


def test_the_price_and_the_warning() -> None:
    plan = calibrated(central(rounds=20, sigma=0.0, epsilon=8.0))
    said = central_statement(plan, 50)
    assert said["unit"] == "site, in all rounds"
    assert 7.9 < said["epsilon"] <= 8.0
    assert said["epsilon"] == prv([Entry(plan.privacy.sigma, 1.0, 20)], 1e-5)
    assert entry(plan).steps == 20
    assert said["noise_to_signal"] == pytest.approx(plan.privacy.sigma * math.sqrt(3) / 50)
    assert useless(plan, 50) == ""
    assert "2 sites: a round's noise is" in useless(plan, 2)
    assert useless(plain(plan), 2) == ""


@pytest.mark.parametrize("stray", [{"nominal_patients": 9}, {"examples": 2}, {"metrics": "noised"}])
def test_what_is_said_of_patients_is_refused(stray: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"privacy\.mode central protects sites; leave it out"):
        central(**stray)


def test_no_room_for_the_noise() -> None:
    with pytest.raises(Stop, match="has no room in a sum"):
        build_strategy(central(sigma=1e4, clip=1e6))
