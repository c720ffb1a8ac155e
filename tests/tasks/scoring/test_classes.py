"""Federated scores against scikit-learn's on pooled patients, whatever the split and the order of merging."""

from __future__ import annotations

import itertools
from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics  # type: ignore[import-untyped]
from torch import Tensor

from tasks.metrics import Statistics, code
from tasks.scoring.classes import KINDS
from tasks.scoring.ranked import BINS, Ranking, auroc_interval, histogram

N = 60


def draw(kind: str, k: int, seed: int, n: int = N) -> tuple[Tensor, Tensor]:
    """Truths and answers that have something to do with each other; answers to two decimals, for ties."""
    g = torch.Generator().manual_seed(seed)
    if kind == "continuous":
        truth = torch.randn(n, k, generator=g).double() * 7 + 50
        return truth, truth + torch.randn(n, k, generator=g)
    if kind == "multilabel":
        truth = (torch.rand(n, k, generator=g) < 0.4).double()
        score = (torch.rand(n, k, generator=g) * 0.8 + 0.2 * truth).mul(50).round().div(50).double()
        truth[torch.rand(n, k, generator=g) < 0.2] = torch.nan
        return truth, score
    truth = torch.randint(k, (n,), generator=g)
    truth[:k] = torch.arange(k)  # every class is there
    logits = torch.randn(n, k, generator=g) + 1.5 * torch.nn.functional.one_hot(truth, k)
    p = logits.double().softmax(1).mul(20).round() + 0.01
    return truth.double(), p / p.sum(1, keepdim=True)


def sites(kind: str, truth: Tensor, given_: Tensor, seed: int) -> Statistics:
    """Three sites of random sizes, merged in random order, each through its vector."""
    rng = np.random.default_rng(seed)
    zero = KINDS[kind].zero(given_.shape[1])
    parts = [[zero], [zero], [zero]]
    for i in rng.permutation(len(truth)):
        parts[rng.integers(3)].append(KINDS[kind].of_patient(f"p{i}", truth[i : i + 1], given_[i : i + 1]))
    told = [zero.from_vector(reduce(lambda a, b: a + b, part).to_vector()) for part in parts]
    merged: Statistics = reduce(lambda a, b: b + a, [told[i] for i in rng.permutation(3)])
    return merged


def oracle_ece(confidence: np.ndarray, right: np.ndarray) -> float:
    edges, total = np.linspace(0, 1, 16), 0.0
    for low, high in itertools.pairwise(edges):
        inside = (confidence >= low) & (confidence < high if high < 1 else confidence <= 1)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def sensitivity(y: np.ndarray, s: np.ndarray) -> float:
    fpr, tpr, _ = metrics.roc_curve(y, s, drop_intermediate=False)
    return float(tpr[fpr <= 0.1 + 1e-12].max())


def of_binary(y: np.ndarray, s: np.ndarray) -> dict[str, float]:
    return {
        "auroc": metrics.roc_auc_score(y, s),
        "ap": metrics.average_precision_score(y, s),
        "sensitivity_at_90": sensitivity(y, s),
    }


def of_classes(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    k, said = p.shape[1], p.argmax(1)
    per = [of_binary(y == c, p[:, c]) for c in range(k)]
    found = per[1] if k == 2 else {name: float(np.mean([part[name] for part in per])) for name in per[0]}
    if k > 2:
        found |= {f"auroc_{c}": per[c]["auroc"] for c in range(k)}
    table = metrics.confusion_matrix(y, said, labels=range(k))
    return found | {
        "accuracy": metrics.accuracy_score(y, said),
        "balanced_accuracy": metrics.balanced_accuracy_score(y, said),
        "f1": metrics.f1_score(y, said, average="binary" if k == 2 else "macro"),
        "brier": metrics.brier_score_loss(y, p[:, 1]) if k == 2 else metrics.brier_score_loss(y, p),
        "ece": oracle_ece(p.max(1), said == y),
        **{f"confusion_{i}_{j}": float(table[i, j]) for i in range(k) for j in range(k)},
    }


def of_ordinal(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    said = p.argmax(1)
    kappa = metrics.cohen_kappa_score(y, said, weights="quadratic")
    return of_classes(y, p) | {"kappa_quadratic": kappa, "mae": metrics.mean_absolute_error(y, said)}


def of_labels(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    found: dict[str, float] = {}
    parts = []
    for c in range(p.shape[1]):
        known = ~np.isnan(y[:, c])
        t, s = y[known, c], p[known, c]
        said = (s >= 0.5).astype(float)
        parts.append(
            of_binary(t, s)
            | {
                "brier": metrics.brier_score_loss(t, s),
                "f1": metrics.f1_score(t, said),
                "balanced_accuracy": metrics.balanced_accuracy_score(t, said),
                "ece": oracle_ece(np.where(said == 1, s, 1 - s), said == t),
            }
        )
        found |= {f"{name}_{c}": value for name, value in parts[-1].items()}
    return found | {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def of_values(y: np.ndarray, g: np.ndarray) -> dict[str, float]:
    per = [
        {
            "mae": metrics.mean_absolute_error(t, s),
            "rmse": metrics.root_mean_squared_error(t, s),
            "r2": metrics.r2_score(t, s),
            "correlation": np.corrcoef(t, s)[0, 1],
        }
        for t, s in zip(y.T, g.T, strict=True)
    ]
    if len(per) == 1:
        return per[0]
    means = {name: float(np.mean([part[name] for part in per])) for name in per[0]}
    return means | {f"{name}_{c}": value for c, part in enumerate(per) for name, value in part.items()}


ORACLES = {"classes": of_classes, "ordinal": of_ordinal, "multilabel": of_labels, "continuous": of_values}
CASES = [
    ("classes", 2),
    ("classes", 4),
    ("ordinal", 5),
    ("multilabel", 1),
    ("multilabel", 3),
    ("continuous", 1),
    ("continuous", 2),
]


def test_every_kind_has_an_oracle() -> None:
    assert {kind for kind, _ in CASES} == set(KINDS) == set(ORACLES)


@pytest.mark.parametrize(("kind", "k"), CASES)
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_three_sites_equal_the_pooled_oracle(kind: str, k: int, seed: int) -> None:
    truth, p = draw(kind, k, seed)
    merged = sites(kind, truth, p, seed)
    assert merged.patients == int((~truth.reshape(N, -1).isnan().all(1)).sum())
    wanted = ORACLES[kind](truth.numpy(), p.numpy())
    found = merged.value()
    assert {n: found[n] for n in wanted} == pytest.approx(wanted, abs=1e-6)
    binned = merged.alone()
    assert len(binned.rows) == 0
    close = binned.value()
    for name, value in wanted.items():
        stem, _, which = name.rpartition("_")
        bound = (f"{stem}_bound_{which}", f"{name}_bound", f"{stem}_{which}_bound")
        slack = max((close[b] for b in bound if b in close), default=0.0)
        if not name.startswith("sensitivity"):  # a step of the curve may lie within a bin
            assert close[name] == pytest.approx(value, abs=slack + 1e-6), name


@pytest.mark.parametrize(("kind", "k"), CASES)
def test_the_monoid_laws_hold(kind: str, k: int) -> None:
    truth, p = draw(kind, k, 3)
    zero = KINDS[kind].zero(k)
    a, b, c = (KINDS[kind].of_patient(str(i), truth[i : i + 1], p[i : i + 1]) for i in (0, 1, 9))
    assert type(a + b) is KINDS[kind]

    def same(x: Statistics, y: Statistics) -> None:
        torch.testing.assert_close(x.alone().to_vector(), y.alone().to_vector())
        ordered = (s.rows[s.rows[:, 0].argsort()] for s in (x, y))
        torch.testing.assert_close(*ordered, equal_nan=True)

    same(a + b, b + a)
    same((a + b) + c, a + (b + c))
    same(a + zero, a)
    whole = a + b + c
    same(zero.from_vector(whole.to_vector()), whole)
    assert bool(whole.to_vector().isfinite().all())
    assert len(whole.columns) == whole.rows.shape[1]
    torch.testing.assert_close(whole.alone().to_vector(), sum(part.alone().to_vector() for part in (a, b, c)))
    with pytest.raises(ValueError, match=r"statistics vector has shape .*; need \(\d+,\) and rows of"):
        zero.from_vector(whole.to_vector()[:-1])
    assert zero.value() == {}
    assert zero.patients == 0


@pytest.mark.parametrize(("kind", "k"), CASES)
def test_every_metric_is_known_before_there_is_a_patient(kind: str, k: int) -> None:
    truth, given_ = draw(kind, k, 0)
    told = sites(kind, truth, given_, 0).value()
    assert set(told) <= KINDS[kind].zero(given_.shape[1]).names()


def test_a_patients_cases_with_one_truth_are_one_row() -> None:
    kind = KINDS["classes"]
    p = torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.9, 0.1]])
    found = kind.of_patient("p", torch.tensor([1.0, 1.0, 0.0]), p)
    assert found.patients == 1
    wanted = [[code("p"), 0, 0.9, 0.1], [code("p"), 1, 0.3, 0.7]]
    torch.testing.assert_close(found.rows, torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)
    assert found.cells().tolist() == [1, 1, 1]
    unknown = KINDS["multilabel"].of_patient("p", torch.full((1, 2), torch.nan), torch.rand(1, 2))
    assert unknown.patients == 0
    assert not len(unknown.rows)


def test_cells_are_the_patients_behind_each_denominator() -> None:
    label = KINDS["multilabel"].of_patient("p", torch.tensor([[1.0, torch.nan]]), torch.rand(1, 2))
    assert label.cells().tolist() == [1, 0, 1, 0, 0]
    value = KINDS["continuous"].of_patient("p", torch.tensor([[3.0, torch.nan]]), torch.rand(1, 2))
    assert value.cells().tolist() == [1, 1, 0]


def test_what_is_no_probability_or_class_is_refused() -> None:
    kind = KINDS["classes"]
    with pytest.raises(ValueError, match="truth holds 3; need 0 to 1"):
        kind.of_patient("p", torch.tensor([3.0]), torch.tensor([[0.5, 0.5]]))
    with pytest.raises(ValueError, match="a probability is"):
        kind.of_patient("p", torch.tensor([1.0]), torch.tensor([[-2.0, 3.0]]))
    with pytest.raises(ValueError, match=r"truth is \(2, 1\), given \(1, 2\)"):
        kind.of_patient("p", torch.tensor([1.0, 0.0]), torch.tensor([[0.5, 0.5]]))
    diverged = kind.of_patient("p", torch.tensor([1.0]), torch.tensor([[torch.nan, torch.nan]]))
    assert diverged.value()["accuracy"] == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([1.0, 8.0, 30.0]))
def test_bins_keep_within_their_bound_for_extreme_scores(seed: int, spread: float) -> None:
    g = torch.Generator().manual_seed(seed)
    y = torch.rand(80, generator=g) < 0.3
    y[:2] = torch.tensor([True, False])
    s = ((torch.randn(80, generator=g) + y) * spread).sigmoid()  # float32: many are exactly 1
    found = Ranking.of_bins(histogram(s, y)).value()
    assert abs(found["auroc"] - metrics.roc_auc_score(y, s)) <= found["auroc_bound"] + 1e-9
    assert abs(found["ap"] - metrics.average_precision_score(y, s)) <= found["ap_bound"] + 1e-9
    exact = Ranking.of_scores(s.double(), y).value()
    assert found["auroc_lo"] <= exact["auroc_lo"] + 1e-9
    assert exact["auroc_hi"] <= found["auroc_hi"] + 1e-9


def test_the_bound_is_small_where_bins_even_in_the_probability_would_fail() -> None:
    g = torch.Generator().manual_seed(0)
    y = torch.rand(2000, generator=g) < 0.5
    s = (torch.randn(2000, generator=g) * 2 - 9 + 3 * y).sigmoid()
    assert Ranking.of_bins(histogram(s, y)).value()["auroc_bound"] < 0.002
    assert histogram(torch.tensor([0.0, 1.0]), torch.tensor([True, True]))[1, [0, BINS - 1]].tolist() == [
        1,
        1,
    ]


def test_auroc_intervals_cover() -> None:
    rng = np.random.default_rng(0)
    n, p, true = 30, 25, 0.7602499  # of two normals, one deviation apart
    inside = 0
    for _ in range(200):
        y = np.r_[np.zeros(n), np.ones(p)]
        auroc = metrics.roc_auc_score(y, rng.normal(size=n + p) + y)
        low, high = auroc_interval(auroc, n, p)
        inside += low <= true <= high
    assert 0.91 <= inside / 200 <= 0.99
    assert auroc_interval(1.0, n, p)[0] < 0.95  # no certainty from 55 patients


def test_noise_on_sums_cannot_break_the_value() -> None:
    for kind, k in CASES:
        truth, p = draw(kind, k, 1)
        merged = sites(kind, truth, p, 1).alone()
        for seed in range(3):
            noise = torch.randn(len(merged.to_vector()), generator=torch.Generator().manual_seed(seed))
            noisy = merged.from_vector(merged.to_vector() + 3 * noise)
            assert all(np.isfinite(v) for v in noisy.value().values()), kind
