"""ε against Opacus (which computes it), Google's PLD (which does not share a line), and closed forms."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
from dp_accounting import NeighboringRelation  # type: ignore[import-untyped]
from dp_accounting.pld import privacy_loss_distribution as pld  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant  # type: ignore[import-untyped]
from opacus.accountants.analysis.rdp import compute_rdp  # type: ignore[import-untyped]
from scipy.optimize import brentq  # type: ignore[import-untyped]
from scipy.stats import norm  # type: ignore[import-untyped]

from strategies.privacy.accountant import (
    ORDERS,
    Entry,
    across,
    calibrate,
    curve,
    epsilon,
    merged,
    prv,
    rdp,
    replace_one,
)

#: σ, q, steps, δ; then PLD, PRV, RDP as published with the design
ROWS = [
    (1.0, 0.01, 1000, 1e-5, 1.8282, 1.8384, 2.1014),
    (1.1, 0.004266667, 14062, 1e-5, 2.3817, 2.3917, 2.5966),
    (1.0, 0.02, 500, 1e-5, 2.7735, 2.7836, 3.1443),
    (0.8, 0.05, 200, 1e-4, 6.4726, 6.4831, 7.4903),
    (0.6, 0.01, 1000, 1e-5, 7.4336, 7.4442, 8.6659),
    (2.0, 0.1, 300, 1e-4, 3.5965, 3.6068, 3.9917),
    (4.0, 0.25, 100, 1e-3, 1.8390, 1.8492, 2.1072),
    (1.5, 0.1, 1000, 1e-5, 12.5696, 12.5802, 13.5635),
    (1.0, 1.0, 1, 1e-5, 4.3772, 4.3874, 4.7285),
    (5.0, 1.0, 100, 1e-5, 9.9973, 10.0077, 10.7255),
    (0.5, 0.001, 10000, 1e-6, 6.3461, 6.3566, 7.5697),
    (1.3, 0.016, 3900, 1e-5, 3.9806, 3.9908, 4.3289),
    (10.0, 0.5, 2000, 1e-6, 12.6438, 12.6542, 13.4306),
]
MIXED = [Entry(1.0, 0.01, 600), Entry(1.3, 0.016, 500), Entry(20.0, 1.0, 3)]


def opacus(kind: type, history: list[tuple[float, float, int]], delta: float) -> float:
    counter = kind()
    counter.history = history
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return float(counter.get_epsilon(delta))


def exact(entries: list[Entry], delta: float, replace: bool = False) -> float:
    neighbours = NeighboringRelation.REPLACE_ONE if replace else NeighboringRelation.ADD_OR_REMOVE_ONE
    parts = [
        pld.from_gaussian_mechanism(e.sigma, sampling_prob=e.q, neighboring_relation=neighbours).self_compose(
            e.steps
        )
        for e in entries
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.compose(part)
    return float(whole.get_epsilon_for_delta(delta))


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "by_pld", "by_prv", "by_rdp"), ROWS)
def test_the_published_rows(
    sigma: float, q: float, steps: int, delta: float, by_pld: float, by_prv: float, by_rdp: float
) -> None:
    entry = Entry(sigma, q, steps)
    found = prv([entry], delta)
    assert found == pytest.approx(opacus(PRVAccountant, [(sigma, q, steps)], delta), abs=1e-9)
    assert f"{found:.4f}" == f"{by_prv:.4f}"
    assert f"{rdp([entry], delta):.4f}" == f"{by_rdp:.4f}"
    assert rdp([entry], delta) == pytest.approx(opacus(RDPAccountant, [(sigma, q, steps)], delta), abs=1e-9)
    second = exact([entry], delta)
    assert second == pytest.approx(by_pld, abs=6e-5)
    assert 0 <= found - second <= 0.012


@pytest.mark.parametrize(
    ("sigma", "q"), list(itertools.product([0.3, 0.7, 1, 3, 30], [1e-6, 0.01, 0.5, 0.97, 1]))
)
def test_divergences_are_those_of_opacus(sigma: float, q: float) -> None:
    shared = ORDERS <= 63
    theirs = compute_rdp(q=q, noise_multiplier=sigma, steps=1, orders=list(ORDERS[shared]))
    # Opacus breaks its series off at exp(-30)
    np.testing.assert_allclose(curve(sigma, q)[shared], theirs, rtol=1e-9, atol=5e-12)
    # log A is convex, and divergences rise with the order
    assert (np.diff(curve(sigma, q)) >= -1e-15).all()


def test_rounds_cost_what_one_run_costs() -> None:
    once = prv([Entry(1.0, 0.02, 500)], 1e-5)
    assert prv([Entry(1.0, 0.02, 10)] * 50, 1e-5) == pytest.approx(once, abs=1e-9)
    assert rdp([Entry(1.0, 0.02, 10)] * 50, 1e-5) == pytest.approx(rdp([Entry(1, 0.02, 500)], 1e-5), abs=1e-9)
    assert 50 * prv([Entry(1.0, 0.02, 10)], 1e-5) > 10 * once


def test_mixed_runs_cost_their_joint_value() -> None:
    joint = prv(MIXED, 1e-5)
    assert joint == pytest.approx(prv(MIXED[::-1], 1e-5), abs=1e-9)
    assert 0 <= joint - exact(MIXED, 1e-5) <= 0.012
    assert joint < 0.75 * sum(prv([e], 1e-5) for e in MIXED)
    assert joint < rdp(MIXED, 1e-5)


KINDS = st.builds(Entry, st.sampled_from([0.5, 1.0, 4.0]), st.sampled_from([0.01, 1.0]), st.integers(1, 99))


@given(st.lists(KINDS, max_size=8), KINDS)
def test_composition_knows_no_order_and_grows(entries: list[Entry], more: Entry) -> None:
    assert merged(entries) == merged(merged(entries)) == merged(entries[::-1])
    assert sum(e.steps for e in merged(entries)) == sum(e.steps for e in entries)
    assert rdp(entries, 1e-5) <= rdp([*entries, more], 1e-5)


@given(st.floats(0.05, 1e5), st.floats(1e-8, 1), st.integers(1, 10**6), st.floats(1e-10, 0.1))
def test_every_kind_of_release_has_an_upper_bound(sigma: float, q: float, steps: int, delta: float) -> None:
    found = rdp([Entry(sigma, q, steps)], delta)
    assert found >= 0
    assert not math.isnan(found)


def test_nothing_costs_nothing_and_no_noise_costs_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for method in (prv, rdp, replace_one):
        assert method([], 1e-5) == 0
        for sigma in (0.0, 0.04):
            assert method([Entry(sigma, 0.01, 1), *MIXED], 1e-5) == math.inf
    endless = [Entry(1000.0, 1e-6, 10**9)]
    assert prv(endless, 1e-5) == rdp(endless, 1e-5)
    monkeypatch.setattr(PRVAccountant, "get_epsilon", lambda *_, **__: 1 / 0)
    assert prv(MIXED, 1e-5) == rdp(MIXED, 1e-5)


def test_gaussian_dp_is_refused() -> None:
    with pytest.raises(
        ValueError, match="'gdp'; known: prv, rdp; gdp is an approximation and up to 46 % too low"
    ):
        epsilon(MIXED, 1e-5, "gdp")
    with pytest.raises(ValueError, match=r"'mine'; known: prv, rdp$"):
        epsilon(MIXED, 1e-5, "mine")
    assert epsilon(MIXED, 1e-5, "rdp") == rdp(MIXED, 1e-5)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"sigma": math.nan}, "sigma is nan; need a finite number"),
        ({"sigma": "1"}, "sigma is '1'; need a finite number"),
        ({"sigma": -1}, "sigma is -1.0; need at least 0"),
        ({"q": 0}, "q is 0.0; need more than 0 and at most 1"),
        ({"q": 1.1}, "q is 1.1"),
        ({"steps": 0}, "steps is 0; need a whole number"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"steps": True}, "steps is True"),
        ({"mechanism": "laplace"}, "mechanism is 'laplace'; every release is gaussian"),
        ({"unit": "slice"}, "unit is 'slice'; it is patient"),
    ],
)
def test_what_is_no_entry(given: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Entry(**{"sigma": 1.0, "q": 0.5, "steps": 1} | given)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_delta_is_a_chance(delta: float) -> None:
    for method in (prv, rdp, replace_one):
        with pytest.raises(ValueError, match="delta is"):
            method([MIXED[0]], delta)


@pytest.mark.parametrize(
    ("target", "q", "steps", "behind"), [(3.0, 0.05, 200, []), (2.0, 0.02, 300, MIXED[:1])]
)
def test_a_calibrated_sigma_is_the_least(target: float, q: float, steps: int, behind: list[Entry]) -> None:
    sigma = calibrate(target, 1e-4, steps, q, behind)
    assert prv([*behind, Entry(sigma, q, steps)], 1e-4) <= target
    assert prv([*behind, Entry(sigma - 0.001, q, steps)], 1e-4) > target


def test_what_cannot_be_calibrated() -> None:
    with pytest.raises(
        ValueError, match=r"no sigma up to 10000 keeps 10 steps at q=0.5 within 1, 1.\d{4} is used"
    ):
        calibrate(1, 1e-5, 10, 0.5, MIXED[:1])
    with pytest.raises(ValueError, match="epsilon is 0; need more than 0"):
        calibrate(0, 1e-5, 10, 0.5)


def test_another_patient_in_ones_place_costs_more_than_one_less() -> None:
    delta = 1e-5
    for entry in (Entry(1.0, 0.01, 1000), Entry(5.0, 1.0, 10)):
        found, one = replace_one([entry], delta), prv([entry], delta)
        assert exact([entry], delta, replace=True) <= found <= 2.6 * one
    # all patients in every step: one Gaussian, sensitivity 2 (Balle, Wang 2018, theorem 8)
    mu = 2 * math.sqrt(10) / 5
    closed = brentq(
        lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e) * norm.cdf(-mu / 2 - e / mu) - delta, 0, 50
    )
    assert closed == pytest.approx(exact([Entry(5.0, 1.0, 10)], delta, replace=True), abs=1e-3)


def test_over_hospitals() -> None:
    sites = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 0.5}
    assert across({}) == 0
    assert across(sites) == 3
    assert across(sites, [("a", "b", "d")]) == 3.5
    assert across(sites, [("a", "b")]) == 3
    assert across(sites, [("a", "b"), ("c", "d"), ("b", "c")]) == 6.5
    with pytest.raises(ValueError, match="overlaps name x; sites are a, b, c, d"):
        across(sites, [("a", "x")])


def test_reservations_need_no_torch() -> None:
    code = (
        "import sys; from strategies.privacy.accountant import Entry, rdp; import client.ledger;"
        "rdp([Entry(1.0, 0.01, 10)], 1e-5); print(sorted({'torch', 'scipy', 'opacus'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
