"""The bound against closed forms and against mechanisms whose ε is known; attacks against scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]
from sklearn.metrics import roc_auc_score, roc_curve  # type: ignore[import-untyped]

from server.audit.bound import attack, deviation, guess, lower_bound, p_value


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@pytest.mark.parametrize("r", [1, 5, 50, 1000])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_all_right_is_bounded_by_the_chance_of_all_right(r: int, level: float) -> None:
    expected = max(0.0, logit(level ** (1 / r)))
    assert lower_bound(r, r, r, 0.0, level) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("r", "v"), [(10, 9), (100, 80), (100, 50), (800, 700), (30, 0), (0, 0)])
def test_without_delta_it_is_clopper_and_pearsons(r: int, v: int) -> None:
    low = float(stats.beta.ppf(0.05, v, r - v + 1)) if v else 0.0
    assert lower_bound(1000, r, v, 0.0, 0.05) == pytest.approx(max(0.0, logit(low)) if low else 0.0, abs=1e-6)


@pytest.mark.parametrize(("m", "r", "v"), [(10, 8, 7), (6, 6, 6), (40, 20, 14), (5, 3, 0)])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
def test_delta_moves_as_much_as_the_theorem_says(m: int, r: int, v: int, epsilon: float) -> None:
    """Written out with binomial coefficients."""
    q, delta = math.exp(epsilon) / (1 + math.exp(epsilon)), 0.003
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    most = max((sum(mass[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    expected = min(1.0, sum(mass[v:]) + 2 * m * delta * most)
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


counts = st.tuples(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300)).map(
    lambda three: (three[0], min(three[:2]), min(three))
)


@settings(max_examples=150, deadline=None)
@given(counts, st.floats(0, 8), st.floats(0, 0.2))
def test_no_mechanism_that_leaks_with_delta_beats_it(
    sizes: tuple[int, int, int], epsilon: float, delta: float
) -> None:
    """Randomised response that tells the truth with probability δ is (ε, δ)-DP."""
    m, r, v = sizes
    right = delta + (1 - delta) / (1 + math.exp(-epsilon))
    assert stats.binom.sf(v - 1, r, right) <= p_value(m, r, v, epsilon, delta) + 1e-9


@settings(max_examples=40, deadline=None)
@given(counts, st.floats(0, 0.01), st.floats(0.001, 0.2))
def test_more_proof_more_epsilon(sizes: tuple[int, int, int], delta: float, level: float) -> None:
    m, r, v = sizes
    bound = lower_bound(m, r, v, delta, level)
    if v < r:
        assert lower_bound(m, r, v + 1, delta, level) >= bound - 1e-6
    assert lower_bound(m + 10, r, v, delta, level) <= bound + 1e-6
    assert lower_bound(m, r, v, delta + 0.01, level) <= bound + 1e-6
    assert lower_bound(m, r, v, delta, level / 2) <= bound + 1e-6
    assert p_value(m, r, v, bound + 0.01, delta) >= level or bound == pytest.approx(60.0)


def test_it_is_wrong_in_one_run_of_twenty_at_most() -> None:
    """Randomised response at ε = 1, the mechanism for which the bound is tight."""
    draw, epsilon = np.random.default_rng(0), 1.0
    wrong = 0
    for _ in range(100):
        included = draw.random(500) < 0.5
        kept = draw.random(500) < 1 / (1 + math.exp(-epsilon))
        scores = (included == kept) + 1e-6 * draw.random(500)
        wrong += guess(scores, included, 0.0).epsilon > epsilon
    assert wrong <= 5


def test_perfect_scores_prove_as_much_as_their_number_allows() -> None:
    included = np.arange(1000) % 2 == 0
    best = guess(included + 0.0, included, 0.0)
    assert (best.high, best.low, best.right) == (400, 400, 800)
    assert best.epsilon == pytest.approx(logit((0.05 / 3) ** (1 / 800)), abs=1e-6)
    assert guess(np.zeros(1000), included, 0.0).epsilon < 1
    assert guess(np.zeros(0), included[:0], 0.0).epsilon == 0


@pytest.mark.parametrize("wrong", [(5, 6, 1, 1.0, 0.0), (5, 3, 4, 1.0, 0.0), (5, 3, 1, -1.0, 0.0)])
def test_numbers_that_cannot_be_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="need v <= r <= m"):
        p_value(*wrong)


def test_the_deviations_interval_holds_it() -> None:
    draw = np.random.default_rng(1)
    found = [deviation(3 * draw.standard_normal(400), 0.05) for _ in range(400)]
    assert 0.92 < np.mean([low <= 3 <= high for _, low, high in found]) < 0.98
    values = draw.standard_normal(50)
    assert deviation(values)[0] == pytest.approx(float(np.sqrt(np.mean(values**2))))


@pytest.mark.parametrize("decimals", [1, 12], ids=["ties", "none"])
@pytest.mark.parametrize("shift", [0.0, 1.0, 8.0])
def test_an_attack_is_scored_like_scikit_learn_does(decimals: int, shift: float) -> None:
    draw = np.random.default_rng(2)
    members, others = draw.normal(shift, 1, 300).round(decimals), draw.normal(0, 1, 2500).round(decimals)
    truth, scores = np.repeat([1, 0], [300, 2500]), np.concatenate([members, others])
    found = attack(members, others)
    assert found.auroc == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert found.tpr == pytest.approx(tpr[fpr <= 0.001].max())
    assert found.low <= found.auroc <= found.high


def test_the_interval_holds_the_truth() -> None:
    draw, truth = np.random.default_rng(3), float(stats.norm.cdf(1 / math.sqrt(2)))
    found = [attack(draw.normal(1, 1, 60), draw.normal(0, 1, 40)) for _ in range(300)]
    assert 0.91 < np.mean([one.low <= truth <= one.high for one in found]) < 0.98


def test_an_attack_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="0 members and 3 others"):
        attack(np.zeros(0), np.zeros(3))
