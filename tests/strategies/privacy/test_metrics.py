"""Noised metrics: how far one patient moves a release, its noise, and what is told of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.evaluate import Metrics
from strategies import build_strategy
from strategies.exact import Collected
from strategies.privacy import metrics, noise
from strategies.privacy.accountant import Entry
from tasks.metrics import Statistics
from tasks.scoring.classes import KINDS
from tasks.scoring.overlap import SegmentationStatistics
from tests.toys import MeanLoss, toy_plan

ZERO = SegmentationStatistics.zero(2, 3)
SENT = ("count", "present", "dice", "iou")
WIDE = torch.cat(
    [torch.full((getattr(ZERO, n).numel(),), b, dtype=torch.float64) for n, b in ZERO.bounds().items()]
)


def patient(seed: int, odd: float | None = None) -> SegmentationStatistics:
    draw = torch.Generator().manual_seed(seed)
    masks = [torch.randint(3, (3, 3, 3), generator=draw) for _ in "ab"]
    made = SegmentationStatistics.of_patient(str(seed), [(masks[0], masks[1], (1.0, 1.0, 1.0))], 2)
    return made if odd is None else made.from_vector(made.alone().to_vector() * odd)


def still(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64)


def silent(patients: list[SegmentationStatistics]) -> SegmentationStatistics:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "normal", still)
        return ZERO.from_vector(metrics.release(patients, ZERO, 1.0))


@given(st.lists(st.integers(0, 99), max_size=4), st.sampled_from([None, 1e30, math.inf, math.nan, -7.0]))
@settings(max_examples=60, deadline=None)
def test_one_patient_moves_it_by_what_its_noise_is_in_units_of(rest: list[int], odd: float | None) -> None:
    others = [patient(seed) for seed in rest]
    moved = silent([*others, patient(200, odd)]).to_vector() - silent(others).to_vector()
    assert not moved[WIDE == 0].any()
    reach = math.sqrt(len(SENT))
    assert float((moved[WIDE > 0] / (WIDE[WIDE > 0] * reach)).norm()) <= 1 + 1e-9


def test_no_patients_statistics_are_clipped() -> None:
    some = [patient(seed) for seed in range(8)]
    got, exact = silent(some), sum(some, ZERO)
    for name in ZERO.sums():
        kept = torch.zeros_like(getattr(exact, name)) if name not in SENT else getattr(exact, name)
        assert torch.allclose(getattr(got, name), kept), name


def test_the_noise_is_what_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "normal", lambda n: torch.ones(n, dtype=torch.float64))
    assert torch.allclose(metrics.release([], ZERO, 3.0), 3.0 * math.sqrt(len(SENT)) * WIDE)


@pytest.mark.parametrize(("rounds", "every"), [(10, 1), (10, 3), (9, 3), (5, 9), (5, 0)])
@pytest.mark.parametrize("strategy", ["fedavg", "ditto"])
def test_what_is_planned_is_what_the_loop_asks(rounds: int, every: int, strategy: str) -> None:
    plan = toy_plan(
        strategy,
        federation={"rounds": rounds, "evaluate_every": every, "weight": "equal"},
        privacy={
            "mode": "dpsgd",
            "nominal_patients": 9,
            "sigma": 1.0,
            "metrics": "noised",
            "metrics_sigma": 5.0,
        },
    )
    due = [r for r in range(1, rounds + 1) if r == rounds or (every and r % every == 0)]
    models = 2 if strategy == "ditto" else 1
    assert metrics.planned(plan, build_strategy(plan)) == models * (len(due) + 1)
    assert metrics.entry(plan, 3) == Entry(5.0, 1.0, 3)
    assert metrics.covers(plan, "federated")
    assert not metrics.covers(plan, "constant")


@pytest.mark.parametrize("shift", [-50.0, -1.0, 0.0, 0.3, 50.0])
def test_whatever_the_noise_the_table_holds_numbers(
    shift: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = toy_plan(
        federation={"weight": "equal"},
        privacy={"mode": "dpsgd", "nominal_patients": 9, "sigma": 1, "metrics": "noised", "metrics_sigma": 1},
    )
    monkeypatch.setattr(noise, "normal", lambda n: torch.full((n,), shift, dtype=torch.float64))
    sent = {"statistics/sum": metrics.release([patient(1), patient(2)], ZERO, 1.0)}
    rows = Collected(None, {"a": ("", 1, 0)}, {}, {})  # type: ignore[arg-type]
    monkeypatch.setattr(Collected, "answer", lambda *_: sent)
    lines = Metrics(tmp_path / "m", plan).lines(rows, ZERO, 1, "val", "federated")
    assert [line["site"] for line in lines] == ["a", "all"]
    for line in lines:
        assert line["patients"] >= 0
        for name, value in line.items():
            assert not name.endswith(("_lo", "_hi"))
            assert not name.startswith(("volume", "empty"))
            assert not name.startswith("dice") or 0 <= value <= 1


def test_statistics_without_bounds_are_refused() -> None:
    class Unbounded(MeanLoss):
        bounds = Statistics.bounds

    zero = Unbounded(torch.zeros(()), torch.zeros(()))
    with pytest.raises(ValueError, match="Unbounded knows no bound of what one patient adds"):
        metrics.release([], zero, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_answer_is_noised_or_refused(kind: str) -> None:
    zero = KINDS[kind].zero(3)
    if kind == "continuous":
        with pytest.raises(ValueError, match="knows no bound"):
            metrics.release([], zero, 1.0)
        return
    truth = torch.ones(1, 3) if kind == "multilabel" else torch.ones(1)
    one = KINDS[kind].of_patient("p", truth, torch.tensor([[0.1, 0.7, 0.2]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise, "normal", still)
        sent = metrics.release([one] * 40, zero, 1.0)
    exact = torch.cat([40 * part.reshape(-1) for part in one.sums().values()])
    leaves = ~metrics.told(zero).to_vector().isnan()
    assert torch.allclose(sent[leaves], exact[leaves])  # nothing of a patient with one row is clipped
    for _ in range(8):
        value = metrics.told(zero.from_vector(metrics.release([one] * 3, zero, 5.0))).value()
        assert all(0 <= v <= 1 for n, v in value.items() if n.startswith(("auroc", "accuracy", "ap_"))), value
