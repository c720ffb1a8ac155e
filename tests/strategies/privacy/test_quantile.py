"""The clip norm that follows: what both releases cost together, and where it comes to rest."""

from __future__ import annotations

import math

import pytest
import torch
from dp_accounting import dp_event  # type: ignore[import-untyped]
from dp_accounting.rdp.rdp_privacy_accountant import RdpAccountant  # type: ignore[import-untyped]
from torch import Tensor

from conf.schema import Adapt
from strategies.privacy import noise
from strategies.privacy.dpsgd import Mechanism
from strategies.privacy.quantile import Quantile


@pytest.mark.parametrize("count_noise", [0.51, 1.0, 2.0, 50.0])
@pytest.mark.parametrize("z", [0.4, 1.0, 7.0])
def test_sum_and_count_cost_together_what_is_charged(z: float, count_noise: float) -> None:
    """dp-accounting composes two Gaussians; of the count a participant moves 1/2."""
    quantile = Quantile(0.5, 0.2, count_noise)
    both, one = RdpAccountant(), RdpAccountant()
    parts = [quantile.of_sum(z), 2 * count_noise * z]
    both.compose(dp_event.ComposedDpEvent([dp_event.GaussianDpEvent(s) for s in parts]))
    one.compose(dp_event.GaussianDpEvent(z))
    assert both.get_epsilon(1e-5) == pytest.approx(one.get_epsilon(1e-5), rel=1e-9)


@pytest.mark.parametrize("aim", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [1e-3, 100.0])
def test_it_comes_to_the_quantile(aim: float, start: float) -> None:
    draw = torch.Generator().manual_seed(0)
    norms = (0.5 + torch.randn(400, generator=draw, dtype=torch.float64)).exp()
    quantile, clip, tail = Quantile(aim, 0.3, 1.0), start, []
    for step in range(400):
        clip = quantile.moved(clip, int((norms <= clip).sum()), len(norms), float(len(norms)), 5.0)
        tail += [math.log(clip)] if step >= 300 else []
    low, high = (float(norms.quantile(q)) for q in (aim - 0.06, aim + 0.06))
    assert low < math.exp(sum(tail) / len(tail)) < high


def test_a_step_is_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(count: int) -> Tensor:
        return torch.ones(count, dtype=torch.float64)

    monkeypatch.setattr(noise, "normal", ones)
    mechanism = Mechanism(1.5, 4.0, 0.1, 8.0, Quantile(0.4, 0.2, 2.0))
    # 5 drawn, 3 inside: (3 - 2.5 + 2 * 1.5) / 8 + 0.5
    assert mechanism.follow(4.0, 3, 5) == pytest.approx(4.0 * math.exp(-0.2 * (3.5 / 8 + 0.5 - 0.4)))
    noised = mechanism.privatise({"w": torch.zeros(1, dtype=torch.float64)}, 2.0)["w"]
    assert float(noised) == pytest.approx(1.5 / (1 - 1 / 16) ** 0.5 * 2.0 / 8)


def test_no_count_throws_it_far(monkeypatch: pytest.MonkeyPatch) -> None:
    for drawn in (-1e9, 1e9):
        monkeypatch.setattr(noise, "normal", lambda _, value=drawn: torch.tensor([value]))
        assert 0.7 < Quantile(0.5, 0.5, 2.0).moved(1.0, 0, 0, 4.0, 1.0) < 1.4
    assert Quantile(0.5, 2.0, 2.0).moved(1e6, 0, 0, 4.0, 1.0) <= 1e6


def test_off_is_a_fixed_clip() -> None:
    assert Quantile.of(Adapt()) is None
    assert Mechanism(1.0, 2.0, 1.0, 4.0).follow(2.0, 0, 4) == 2.0
