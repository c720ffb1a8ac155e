"""Runs by sums: the same predictor as of the pooled cases, round by round, to the end and after a stop."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA  # type: ignore[import-untyped]
from sklearn.linear_model import (  # type: ignore[import-untyped]
    LinearRegression,
    LogisticRegression,
)

from conf.exits import Exit, Stop
from conf.schema import Plan
from strategies import build_strategy
from strategies.base import Study
from tasks.base import Case
from tests.toys import Toys

EXCHANGES = 8


def plan(predictor: str, rounds: int = EXCHANGES, **sections: Any) -> Plan:
    columns = {name: [0, 1] for name in "abcd"}
    task = {"name": "classification", "size": [32, 32], "features": {"name": "none"}, "columns": columns}
    return Plan.model_validate(
        {
            "task": task,
            "model": {"name": "linear"},
            "loss": {"name": "class_cross_entropy"},
            "strategy": {"name": "sums", "predictor": predictor},
            "federation": {"rounds": rounds, "evaluate_every": 0},
            **sections,
        }
    )


def cases(n: int = 90) -> list[Case]:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(n, 4)) * [3, 1, 1, 0.2]
    y = x @ [0.5, -1, 0.5, 0] + draw.normal(size=n) > 0
    return [
        Case(
            str(i),
            str(i),
            {"image": torch.zeros(1, 1, 1)},
            torch.eye(4),
            (),
            {},
            {"label": float(t)},
            dict(zip("abcd", row, strict=True)),
        )
        for i, (row, t) in enumerate(zip(x.tolist(), y, strict=True))
    ]


def run(folder: Path, predictor: str, rounds: int = EXCHANGES) -> tuple[list[float], dict[str, Any], Any]:
    """Probabilities of the test cases by the run's model, that model, and its last test line over all."""
    every = cases()
    held = {f"site_{s}": {"train": every[s:60:3], "val": every[60:66], "test": every[66:]} for s in range(3)}
    toys = Toys(folder, plan(predictor, rounds), held)
    with toys.opened() as loop:
        model = loop.train().model
        (line,) = [x for x in loop.metrics.of("federated") if (x["site"], x["split"]) == ("all", "test")]
        says = loop.strategy.says(loop.study.task, model)
    return [float(says(case).scores["given"][1]) for case in every[66:]], model, line


def pooled() -> tuple[Any, Any, Any]:
    x = np.array([list(case.table.values()) for case in cases()])
    return x[:60], np.array([case.labels["label"] for case in cases()])[:60], x[66:]


def test_logistic_regression_is_scikit_learns_and_more_rounds_change_nothing(ram: Path) -> None:
    x, y, new = pooled()
    # each column comes with a second one, of whether it is missing, that is 0 throughout
    oracle = LogisticRegression(C=1.0, tol=1e-10).fit(x, y).predict_proba(new)[:, 1]
    given, _, line = run(ram / "a", "logistic")
    assert given == pytest.approx(oracle, abs=1e-5)
    assert line["patients"] == 72  # of three sites
    assert run(ram / "b", "logistic", EXCHANGES + 2)[0] == given


def test_principal_components_are_scikit_learns(ram: Path) -> None:
    x, y, new = pooled()
    given, model, _ = run(ram, "pca", 1)
    oracle = PCA().fit(x)
    assert model["explained"].numpy() == pytest.approx(oracle.explained_variance_ * 59 / 60, abs=1e-5)
    assert model["total"].item() == pytest.approx(x.var(0).sum(), abs=1e-5)
    wanted = LinearRegression().fit(oracle.transform(x), y).predict(oracle.transform(new))
    assert given == pytest.approx(np.clip(wanted, 0, 1), abs=1e-4)


def test_what_cannot_run_by_sums_is_named() -> None:
    def checked(made: Plan) -> None:
        build_strategy(made).check(Study.of(made))

    with pytest.raises(
        Stop, match=r"predictor is 'calibrated'; this task's are constant, linear, logistic, pca"
    ):
        checked(plan("calibrated"))
    with pytest.raises(
        Stop, match=r"rounds is 2; logistic takes 8 exchanges, one a round: set it to 8"
    ) as stop:
        checked(plan("logistic", 2))
    assert stop.value.exit is Exit.CONFIG
    private = {"mode": "dpsgd", "sigma": 1.0, "nominal_patients": 100}
    with pytest.raises(Stop, match=r"sends exact sums over its training patients, which privacy\.mode dpsgd"):
        build_strategy(
            plan("linear", privacy=private, local={"batch_size": 8}, federation={"weight": "equal"})
        )
