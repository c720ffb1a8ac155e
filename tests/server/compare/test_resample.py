"""Weighted metrics against scikit-learn, intervals against the closed form and scipy's bootstrap."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]
from sklearn import metrics  # type: ignore[import-untyped]

from server.compare.resample import Scored, by_folds, difference, measured, own

law = settings(deadline=None, max_examples=40)


def classes(truth: np.ndarray, p: np.ndarray, patients: np.ndarray | None = None) -> Scored:
    codes = np.arange(len(truth)) if patients is None else patients
    columns = ("patient", "truth", *(f"p_{k}" for k in range(p.shape[1])))
    return Scored(columns, np.column_stack([codes, truth, p]).astype(float), np.full(len(truth), "a"))


def drawn(seed: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth = np.concatenate([np.arange(k), np.arange(k), random.integers(0, k, n)])
    p = np.round(random.dirichlet(np.ones(k), len(truth)), 1) + 1e-9  # ties
    return truth, p / p.sum(1, keepdims=True), random.integers(1, 4, (1, len(truth))).astype(float)


ORACLES = {
    "auroc": lambda t, p, w: metrics.roc_auc_score(t == 1, p[:, 1], sample_weight=w),
    "ap": lambda t, p, w: metrics.average_precision_score(t == 1, p[:, 1], sample_weight=w),
    "accuracy": lambda t, p, w: metrics.accuracy_score(t, p.argmax(1), sample_weight=w),
    "balanced_accuracy": lambda t, p, w: metrics.balanced_accuracy_score(t, p.argmax(1), sample_weight=w),
    "brier": lambda t, p, w: metrics.brier_score_loss(t == 1, p[:, 1], sample_weight=w),
}


@law
@given(st.integers(0, 2**20), st.integers(0, 40), st.sampled_from(sorted(ORACLES)))
def test_weighted_metrics_are_scikit_learns(seed: int, n: int, metric: str) -> None:
    truth, p, weight = drawn(seed, n, 2)
    found = measured(metric, classes(truth, p), weight)
    assert found is not None
    assert found[0] == pytest.approx(ORACLES[metric](truth, p, weight[0]), abs=1e-9)


def test_of_several_classes_the_mean_of_each_against_the_rest() -> None:
    truth, p, weight = drawn(3, 50, 4)
    scored = classes(truth, p)
    each = [metrics.roc_auc_score(truth == k, p[:, k], sample_weight=weight[0]) for k in range(4)]
    assert measured("auroc", scored, weight) == pytest.approx(np.mean(each))
    assert measured("auroc_2", scored, weight) == pytest.approx(each[2])
    assert measured("auroc_9", scored, weight) is None
    assert measured("ece", scored, weight) is None


def test_labels_that_nobody_knows_are_left_out() -> None:
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, (30, 2)).astype(float)
    truth[::3, 1] = np.nan
    p = random.random((30, 2))
    columns = ("patient", "truth_0", "truth_1", "p_0", "p_1")
    scored = Scored(columns, np.column_stack([np.arange(30), truth, p]), np.full(30, "a"))
    known = ~np.isnan(truth[:, 1])
    each = [
        metrics.roc_auc_score(truth[:, 0], p[:, 0]),
        metrics.roc_auc_score(truth[known, 1], p[known, 1]),
    ]
    assert measured("auroc", scored, np.ones((1, 30))) == pytest.approx(np.mean(each))


def test_dice_is_the_mean_over_classes_of_means_over_patients() -> None:
    dice = np.array([[0.8, np.nan, np.nan], [0.6, 0.4, np.nan], [0.7, 0.2, np.nan]])
    columns = ("patient", "dice_1", "dice_2", "dice_3")
    scored = Scored(columns, np.column_stack([np.arange(3), dice]), np.full(3, "a"))
    weight = np.array([[1.0, 1, 1], [0, 3, 0]])
    assert measured("dice_2", scored, weight) == pytest.approx([0.3, 0.4])
    assert measured("dice_mean", scored, weight) == pytest.approx([(0.7 + 0.3) / 2, 0.5])


def test_the_paired_interval_of_a_mean_is_the_closed_forms() -> None:
    random = np.random.default_rng(1)
    base = random.normal(0.5, 0.2, 200)
    ours, theirs = base + random.normal(0.03, 0.05, 200), base
    made = [
        {(0, 0): Scored(("patient", "dice_1"), np.column_stack([np.arange(200), v]), np.full(200, "a"))}
        for v in (ours, theirs)
    ]
    found = difference("dice_1", *made)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    gap = ours - theirs
    half = 1.96 * gap.std() / 200**0.5
    assert found.value == pytest.approx(gap.mean())
    assert [found.low, found.high] == pytest.approx([gap.mean() - half, gap.mean() + half], abs=half / 8)
    alone = own("dice_1", made[0])
    assert alone is not None
    assert alone.low is not None
    assert alone.high is not None
    assert alone.high - alone.low > 2 * (found.high - found.low)  # pairing takes the patients' own spread out


def test_the_paired_interval_of_auroc_is_scipys() -> None:
    random = np.random.default_rng(2)
    truth = random.integers(0, 2, 150)
    one, two = (np.clip(0.5 + (truth - 0.5) * s + random.normal(0, 0.3, 150), 0, 1) for s in (0.5, 0.3))

    def gap(rows: np.ndarray) -> float:
        i = rows.astype(int)
        return float(metrics.roc_auc_score(truth[i], one[i]) - metrics.roc_auc_score(truth[i], two[i]))

    theirs = stats.bootstrap(
        (np.arange(150),), gap, vectorized=False, n_resamples=600, method="percentile", rng=0
    ).confidence_interval
    series = [{(0, 0): classes(truth, np.column_stack([1 - p, p]))} for p in (one, two)]
    found = difference("auroc", *series)
    assert found is not None
    assert found.value == pytest.approx(gap(np.arange(150)))
    assert [found.low, found.high] == pytest.approx([theirs.low, theirs.high], abs=0.012)
    assert difference("auroc", *series) == found  # the same seed, the same bits


def test_patients_are_drawn_with_all_their_rows_and_repeats() -> None:
    """Two rows a patient, or a second repeat of the same scores, tell nothing more: the interval stays."""
    truth, p, _ = drawn(5, 80, 2)
    once = own("auroc", {(0, 0): classes(truth, p)})
    twice = own("auroc", {(0, 0): classes(np.tile(truth, 2), np.tile(p, (2, 1)), np.tile(np.arange(84), 2))})
    repeats = own(
        "auroc", {(0, 0): classes(truth, p), (1, 0): classes(truth[::-1], p[::-1], np.arange(84)[::-1])}
    )
    assert once is not None
    for other in (twice, repeats):
        assert other is not None
        assert [other.value, other.low, other.high] == pytest.approx([once.value, once.low, once.high])


def test_the_corrected_interval_over_folds() -> None:
    values = [0.02, 0.05, 0.01, 0.04, 0.03]
    found = by_folds(values, 5)
    half = stats.t.ppf(0.975, 4) * np.std(values, ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert [found.value, found.low, found.high] == pytest.approx([0.03, 0.03 - half, 0.03 + half])
    plain = stats.ttest_1samp(values, 0).confidence_interval()
    assert found.low is not None
    assert found.low < plain.low  # training sets overlap: wider
    assert by_folds(values, 0).low is None
    assert by_folds(values[:1], 5).low is None
