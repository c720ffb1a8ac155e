"""Temperatures by sums against the minimum that scipy finds on the pooled cases."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from torch import Tensor, nn

from tasks.base import Case, Prediction
from tasks.targets import TARGETS
from tasks.temperature import MODEL, Temperature


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))


def case(number: int, logits: Tensor, labels: Mapping[str, float]) -> Case:
    table = {str(i): float(z) for i, z in enumerate(logits)}
    return Case(str(number), str(number), {}, torch.eye(4).double(), (), labels=labels, table=table)


def predictor(kind: str, labels: tuple[str, ...]) -> Temperature:
    target = TARGETS[kind](labels, ("a", "b", "c"))

    def say(model: nn.Module, one: Case) -> Prediction:
        logits = torch.tensor(list(one.table.values()), dtype=torch.float64)
        return Prediction(scores={"given": target.decode(logits * dict(model.named_parameters())["by"])})

    return Temperature(target, Scale, say)


def fitted(found: Temperature, cases: list[Case], by: float) -> dict[str, Tensor]:
    known = {**found.start(), MODEL + "by": torch.tensor(by)}
    for _ in range(found.exchanges):
        parts = [found.accumulate(one, known) for one in cases]
        known = dict(found.solve({n: sum((p[n] for p in parts), t) for n, t in found.zero().items()}, known))
    return known


@pytest.mark.parametrize("by", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("kind", ["classes", "multilabel"])
def test_it_is_the_minimum_of_the_pooled_likelihood(kind: str, by: float) -> None:
    draw = np.random.default_rng(0)
    logits = torch.tensor(draw.normal(size=(80, 3)))
    if kind == "classes":
        truth = torch.stack(
            [
                torch.multinomial((z * 1.3).softmax(0), 1, generator=torch.Generator().manual_seed(i))[0]
                for i, z in enumerate(logits)
            ]
        )
        cases = [case(i, z, {"x": float(t)}) for i, (z, t) in enumerate(zip(logits, truth, strict=True))]
        names: tuple[str, ...] = ("x",)

        def loss(s: float) -> float:
            return float(nn.functional.cross_entropy(by * logits / np.exp(s), truth, reduction="sum"))
    else:
        known = torch.tensor(draw.random((80, 3)) < 0.8)
        known[:, 0] = True
        truth = torch.tensor(draw.random((80, 3))) < (logits * 1.3).sigmoid()
        names = ("x", "y", "z")
        cases = [
            case(i, z, {n: float(v) for n, v, k in zip(names, t, there, strict=True) if k})
            for i, (z, t, there) in enumerate(zip(logits, truth, known, strict=True))
        ]

        def loss(s: float) -> float:
            each = nn.functional.binary_cross_entropy_with_logits(
                by * logits / np.exp(s), truth.double(), reduction="none"
            )
            return float(each[known].sum())

    wanted = minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9}).x
    found = predictor(kind, names)
    done = fitted(found, cases, by)
    assert float(done["log_t"]) == pytest.approx(wanted, abs=1e-5)
    before = {**done, "log_t": torch.zeros(()).double()}
    sums = [found.accumulate(one, at)["loss"] for at in (before, done) for one in cases]
    assert float(sum(sums[:80])) == pytest.approx(loss(0), abs=1e-5)
    assert float(sum(sums[80:])) == pytest.approx(loss(wanted), abs=1e-5)


def test_the_likeliest_class_stays_and_certainty_goes() -> None:
    found = predictor("classes", ("x",))
    one = case(0, torch.tensor([1.0, 3.0, 2.0]), {"x": 1.0})
    known = {**found.start(), MODEL + "by": torch.ones(()), "log_t": torch.tensor(2.0).log()}
    given = found.predict(known, one).scores["given"]
    torch.testing.assert_close(
        given, (torch.tensor([1.0, 3.0, 2.0]).double() / 2).softmax(0), rtol=1e-6, atol=0
    )


def test_a_case_that_nobody_labelled_counts_nothing() -> None:
    found = predictor("classes", ("x",))
    sums = found.accumulate(case(0, torch.ones(3), {}), found.start())
    assert sums == found.zero()
