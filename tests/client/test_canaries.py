"""Canaries through the product's own loop: what is seen of them, and which defects they show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import client.private
from client.canaries import Replay, replay
from conf.schema import Plan
from server.audit.command import verdict
from strategies.privacy import dpsgd, noise
from strategies.privacy.accountant import Entry, prv
from strategies.privacy.dpsgd import Mechanism
from tasks import TASKS
from tasks.base import Batch, Phase
from tests.toys import Quadratic, toy_plan

RATE, STEPS, FITS, DELTA = 0.1, 10, 4, 1e-5
SIGMA = 1.638  # ε = 2


@dataclass(frozen=True)
class Pair(Quadratic):
    """Two networks that learn in turn, both from patients, and a third step that reads none."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        def loss(model: nn.Module, batch: Batch | None) -> Tensor:
            raise NotImplementedError("canaries have a loss of their own")

        return (
            Phase("a", loss, lambda name: name.startswith("a")),
            Phase("b", loss, lambda name: name.startswith("b"), every=2),
            Phase("free", loss, private=False),
        )

    def build_model(self) -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(5, 30), "b": nn.Linear(4, 10)})


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known to the table, and mapped: a toy's patients would be looped."""
    monkeypatch.setitem(TASKS._entries, "pair", "tests.client.test_canaries:Pair")
    monkeypatch.setattr(client.private, "gradients", lambda plan: "vmap")


def plan(task: str = "quadratic", **privacy: Any) -> Plan:
    return toy_plan(
        task=task,
        toy={} if task == "pair" else {"size": 1100},
        federation={"weight": "equal", "rounds": FITS},
        local={"batch_size": 50, "steps": STEPS, "momentum": 0.5, "clip_norm": 1.0},
        privacy={"mode": "dpsgd", "nominal_patients": 500, "sigma": SIGMA, **privacy},
    )


def seen(made: Plan, canaries: int = 1000, seed: int = 0) -> Replay:
    return replay(made, canaries=canaries, fits=FITS, seed=seed, device="cpu", watch=lambda *_: None)


def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "normal", lambda count: torch.zeros(count, dtype=torch.float64))


def test_the_sigma_of_these_tests_is_that_of_two() -> None:
    assert 1.99 < prv([Entry(SIGMA, RATE, STEPS * FITS)], DELTA) <= 2


def test_a_canary_moves_its_own_coordinate_by_the_clip_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)
    monkeypatch.setattr(noise, "chosen", lambda count, rate: torch.ones(count, dtype=torch.bool))
    found = seen(plan(clip=0.3), 100)
    torch.testing.assert_close(found.sums, STEPS * FITS * found.included.double())
    assert found.charged == (Entry(SIGMA, RATE, STEPS),) * FITS
    assert (found.steps, found.sigma) == (STEPS * FITS, SIGMA)
    assert 30 < found.included.sum() < 70


def test_every_phase_that_reads_patients_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(monkeypatch)
    monkeypatch.setattr(noise, "chosen", lambda count, rate: torch.ones(count, dtype=torch.bool))
    found = seen(plan("pair"))
    assert len(found.scores) == 50  # no more than the smaller network has values
    torch.testing.assert_close(found.sums, (STEPS + STEPS // 2) * FITS * found.included.double())
    assert found.steps == (STEPS + STEPS // 2) * FITS == sum(entry.steps for entry in found.charged)


def test_a_seed_fixes_who_is_there_and_no_seed_the_noise() -> None:
    one, same, other = seen(plan(), 40), seen(plan(), 40), seen(plan(), 40, seed=1)
    assert one.included.equal(same.included)
    assert not one.included.equal(other.included)
    assert not one.scores.equal(same.scores)


def four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    true = dpsgd.factors
    monkeypatch.setattr(dpsgd, "factors", lambda gradients, clip: true(gradients, 4 * clip))


def unclipped(monkeypatch: pytest.MonkeyPatch) -> None:
    true = dpsgd.factors

    def ones(gradients: Any, clip: float) -> tuple[Tensor, Tensor]:
        share, whole = true(gradients, clip)
        return torch.ones_like(share), whole

    monkeypatch.setattr(dpsgd, "factors", ones)


def often(monkeypatch: pytest.MonkeyPatch) -> None:
    true = noise.chosen
    monkeypatch.setattr(noise, "chosen", lambda count, rate: true(count, 8 * rate))


def scaled(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    true = noise.normal
    monkeypatch.setattr(noise, "normal", lambda count: factor * true(count))


def once_per_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise for every part of a step: too much of it."""
    true = Mechanism.privatise

    def many(self: Mechanism, total: Mapping[str, Tensor], clip: float) -> dict[str, Tensor]:
        parts = [true(self, {n: t / 4 for n, t in total.items()}, clip) for _ in range(2)]
        return {name: sum(part[name] for part in parts) for name in total}  # type: ignore[misc]

    monkeypatch.setattr(Mechanism, "privatise", many)


DEFECTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "no noise": (quiet, "refuted: the lower bound exceeds the claim"),
    "four times the sensitivity": (four_times, "refuted: the lower bound exceeds the claim"),
    "no clipping": (unclipped, "refuted: the lower bound exceeds the claim"),
    "each patient in too many steps": (often, "refuted: the lower bound exceeds the claim"),
    "half the noise": (partial(scaled, 0.5), "refuted: the noise's deviation is 0."),
    "noise once a chunk": (once_per_chunk, "not refuted; but the noise's deviation is"),
}


@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_wrong_with_the_product(seed: int) -> None:
    found = verdict(plan(), seen(plan(), seed=seed), 2.0, seed)
    assert found["verdict"] == "not refuted"
    assert found["words"].startswith(f"ε ≥ {found['epsilon_at_least']:.2f} at")
    assert found["words"].endswith(f" at 95 %, gradient canaries, one run, m = 1000, seed {seed}")


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_shows(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inject, said = DEFECTS[defect]
    inject(monkeypatch)
    found = verdict(plan(), seen(plan()), 2.0, 0)
    assert found["verdict"].startswith(said)
    assert found["refuted"] == said.startswith("refuted")


def test_the_claim_is_held_against_what_was_charged_too() -> None:
    """A ledger that holds too little claims too little."""
    made = plan(sigma=1.0)
    found = seen(made)
    assert verdict(made, replace(found, charged=(Entry(50.0, RATE, 1),)), float("inf"), 0)["refuted"]
    assert not verdict(made, found, float("inf"), 0)["refuted"]


def test_one_patient_after_the_other_is_audited_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.private, "gradients", lambda plan: "loop")
    quiet(monkeypatch)
    monkeypatch.setattr(noise, "chosen", lambda count, rate: torch.ones(count, dtype=torch.bool))
    found = seen(plan(), 40)
    torch.testing.assert_close(found.sums, STEPS * FITS * found.included.double())
