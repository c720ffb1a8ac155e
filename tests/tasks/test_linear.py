"""Linear heads by sums against scikit-learn on the pooled cases."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.linear_model import Ridge as Pooled
from torch import Tensor

from tasks.base import Case, Summed
from tasks.linear import Logistic, Prior, Ridge
from tasks.targets import TARGETS, Target


def cases(n: int = 60, seed: int = 0) -> list[Case]:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(n, 3))
    score = x @ np.array([1.0, -2.0, 0.5]) + draw.normal(size=n)
    return [
        Case(
            f"c{i}",
            f"p{i}",
            {},
            torch.eye(4).double(),
            (),
            labels={"label": float(s > 0), "level": float(np.digitize(s, [-1, 1])), "value": float(s)},
            table={"a": a, "b": b, "c": c},
        )
        for i, ((a, b, c), s) in enumerate(zip(x, score, strict=True))
    ]


def features(case: Case) -> Tensor:
    return torch.tensor([case.table[k] for k in "abc"])


def table(found: list[Case]) -> NDArray[np.float64]:
    return np.array([[c.table[k] for k in "abc"] for c in found])


def fitted(head: Summed, sites: list[list[Case]]) -> dict[str, Tensor]:
    """What a federation does, written out."""
    known = dict(head.start())
    for _ in range(head.exchanges):
        total = {name: t.clone() for name, t in head.zero().items()}
        for site in sites:
            for case in site:
                for name, t in head.accumulate(case, known).items():
                    total[name] += t
        known = dict(head.solve(total, known))
    return known


def target(kind: str, label: str, classes: tuple[str, ...] = ("no", "yes")) -> Target:
    return TARGETS[kind]((label,), classes)


def test_ridge_of_a_value_is_that_of_scikit_learn() -> None:
    all_cases = cases()
    head = Ridge(target("continuous", "value"), features, 3, penalty=0.1)
    known = fitted(head, [all_cases[:10], all_cases[10:35], all_cases[35:]])
    x, y = table(all_cases), np.array([c.labels["value"] for c in all_cases])
    oracle = Pooled(alpha=0.1 * float((x**2).sum(0).mean())).fit(x, y)
    got = [float(head.predict(known, c).scores["given"][0]) for c in all_cases]
    assert got == pytest.approx(oracle.predict(x), abs=1e-6)


def test_logistic_of_two_classes_is_that_of_scikit_learn() -> None:
    all_cases = cases()
    head = Logistic(target("classes", "label"), features, 3, penalty=1.0)
    known = fitted(head, [all_cases[:20], all_cases[20:]])
    x, y = table(all_cases), np.array([c.labels["label"] for c in all_cases])
    oracle = LogisticRegression(C=1.0, tol=1e-10).fit(x, y)
    got = np.stack([head.predict(known, c).scores["given"].numpy() for c in all_cases])
    assert got == pytest.approx(oracle.predict_proba(x), abs=1e-5)


def test_three_classes_are_each_against_the_rest() -> None:
    all_cases = cases()
    head = Logistic(target("classes", "level", ("low", "middle", "high")), features, 3)
    known = fitted(head, [all_cases])
    x, y = table(all_cases), np.array([c.labels["level"] for c in all_cases])
    rows = [LogisticRegression(C=1.0, tol=1e-10).fit(x, y == k).predict_proba(x)[:, 1] for k in range(3)]
    oracle = np.stack(rows, 1)
    got = np.stack([head.predict(known, c).scores["given"].numpy() for c in all_cases])
    assert got == pytest.approx(oracle / oracle.sum(1, keepdims=True), abs=1e-5)


def test_the_prior_is_the_mean() -> None:
    all_cases = cases()
    for kind, label in (("classes", "label"), ("continuous", "value")):
        head = Prior(target(kind, label))
        known = fitted(head, [all_cases[:7], all_cases[7:]])
        mean = np.mean([c.labels[label] for c in all_cases])
        assert float(head.predict(known, all_cases[0]).scores["given"][-1]) == pytest.approx(mean)


def test_each_label_is_fitted_to_the_cases_that_have_it() -> None:
    """No case has both: sites often look for different findings."""
    both = [
        replace(c, labels={("a", "b")[i % 2]: float(c.labels["value"] > 0)}) for i, c in enumerate(cases())
    ]
    several = TARGETS["multilabel"](("a", "b"), ())
    known = fitted(Ridge(several, features, 3, penalty=0.1), [both[:20], both[20:]])
    for k, name in enumerate("ab"):
        own = [c for c in both if name in c.labels]
        alone = Ridge(target("continuous", name), features, 3, penalty=0.1)
        assert torch.allclose(known["weights"][:, k], fitted(alone, [own])["weights"][:, 0])


def test_a_case_without_its_label_is_left_out() -> None:
    all_cases = cases()
    bare = replace(all_cases[0], labels={"other": 1.0, "value": 1.0})
    several = TARGETS["multilabel"](("label", "other"), ())
    prior = Prior(several).accumulate(bare, {})
    assert prior["known"].tolist() == [0.0, 1.0]
