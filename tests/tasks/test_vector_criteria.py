"""Losses of vectors, against torch, MONAI and what can be written down."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses.focal_loss import FocalLoss
from sklearn.metrics import log_loss, mean_absolute_error, mean_squared_error  # type: ignore[import-untyped]
from torch import Tensor, nn

from conf.exits import Stop
from conf.schema import Section
from strategies.privacy.preflight import fault, strays
from tasks.base import Batch, Phase
from tasks.criteria import Criterion
from tasks.losses import LOSS_TABLE, LOSSES

K, B = 4, 5
TARGETS = ("classes", "multilabel", "ordinal", "continuous")
VECTORS = [name for name, entry in LOSS_TABLE.items() if entry.targets in TARGETS]
#: what a loss cannot do without, or what makes it more than its default
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "class_cross_entropy": [{}, {"weights": [1.0, 2.0, 3.0, 4.0], "smoothing": 0.1}],
    "class_focal": [{"gamma": 1.5, "weights": [1.0, 2.0, 3.0, 4.0]}, {"gamma": 0.0}],
    "logit_adjusted": [{"priors": [1.0, 2.0, 3.0, 4.0]}],
    "multilabel_bce": [{"positive": [1.0, 2.0, 3.0, 4.0]}],
    "multilabel_focal": [{"positive": [1.0, 2.0, 3.0, 4.0]}],
}
BUILT = [(name, more) for name in VECTORS for more in SETTINGS.get(name, [{}])]
FORMS = [
    (name, more, soft)
    for name, more in BUILT
    for soft in ((False, True) if LOSS_TABLE[name].targets == "classes" else (False,))
]


def build(name: str, **settings: Any) -> Criterion:
    made: Criterion = LOSSES.build(Section(name=name, **settings))
    return made


def drawn(name: str, soft: bool = False, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Outputs (float64) and a target of the entry's kind; of every kind with NaN some are NaN."""
    draw = torch.Generator().manual_seed(seed)
    output = torch.randn(B, K, generator=draw, dtype=torch.float64)
    if soft:
        return output, torch.rand(B, K, generator=draw, dtype=torch.float64).softmax(1)
    if LOSS_TABLE[name].targets in ("classes", "ordinal"):
        return output, torch.randint(K, (B,), generator=draw)
    target = torch.rand(B, K, generator=draw, dtype=torch.float64)
    if LOSS_TABLE[name].targets == "multilabel":
        target = target.round()
    target[0, 1] = target[1, 0] = target[1, 3] = torch.nan
    return output, target


@pytest.mark.parametrize(("name", "more", "soft"), FORMS)
def test_one_value_and_one_gradient_per_example(name: str, more: dict[str, Any], soft: bool) -> None:
    loss = build(name, **more)
    output, target = drawn(name, soft)
    other, others = drawn(name, soft, seed=2)
    output.requires_grad_()
    values = loss(output, target)
    assert values.shape == (B,)
    assert bool((values > 0).all())
    (gradient,) = torch.autograd.grad(values[0], output)
    assert bool(gradient[0].abs().sum() > 0)
    assert not gradient[1:].any()
    mixed = torch.cat([output[:1], 50 * other[1:]]), torch.cat([target[:1], others[1:]])
    torch.testing.assert_close(loss(*mixed)[0], values[0], rtol=0, atol=0)

    def single(x: Tensor, y: Tensor) -> Tensor:
        value: Tensor = loss(x[None], y[None])[0]
        return value

    mapped = torch.func.vmap(torch.func.grad(single))(output.detach(), target)
    (looped,) = torch.autograd.grad(loss(output, target).sum(), output)
    assert (mapped - looped).abs().max() <= 1e-12


@pytest.mark.parametrize(("name", "more"), BUILT)
def test_patients_pass_the_preflight_of_private_training(name: str, more: dict[str, Any]) -> None:
    loss = build(name, **more)

    def apart(model: nn.Module, batch: Batch | None) -> Tensor:
        if batch is None:
            raise ValueError("needs a batch")
        return loss(model(batch["x"]), batch["y"])

    output, target = drawn(name)
    batch = {"x": output[:2].float(), "y": target[:2].float() if target.is_floating_point() else target[:2]}
    torch.manual_seed(0)
    model = nn.Linear(K, K)
    assert fault(Phase("train", apart), model, batch) == ""
    assert strays(Phase("train", apart), model, batch) == ""


# ---- one class of K


@pytest.mark.parametrize("soft", [False, True])
def test_class_cross_entropy_is_what_it_says(soft: bool) -> None:
    output, target = drawn("class_cross_entropy", soft)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    shares = target if soft else F.one_hot(target, K).double()
    smooth = 0.9 * shares + 0.1 / K
    wanted = -(smooth * weights * output.log_softmax(1)).sum(1)
    found = build("class_cross_entropy", weights=weights.tolist(), smoothing=0.1)(output, target)
    torch.testing.assert_close(found, wanted)


def test_class_cross_entropy_is_scikit_learns() -> None:
    output, target = drawn("class_cross_entropy")
    found = build("class_cross_entropy")(output, target).mean().item()
    assert found == pytest.approx(log_loss(target, output.softmax(1), labels=range(K)), rel=1e-12)


def test_focal_is_monais() -> None:
    output, target = drawn("class_focal")
    found = build("class_focal", gamma=1.5)(output, target)
    oracle = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=1.5, reduction="none")
    torch.testing.assert_close(
        found, oracle(output, target[:, None]).sum(1).double()
    )  # it computes in float32
    soft = F.one_hot(target, K).double()
    torch.testing.assert_close(build("class_focal", gamma=1.5)(output, soft), found)
    torch.testing.assert_close(
        build("class_focal", gamma=0)(output, target), build("class_cross_entropy")(output, target)
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize(("name", "target"), [("class_focal", 0), ("multilabel_focal", 1.0)])
def test_focal_has_a_gradient_where_it_is_sure(name: str, target: float, gamma: float) -> None:
    # (1 - p) ** 0.5 has none at p = 1
    output = torch.tensor([[200.0, 0.0]], requires_grad=True)
    truth = torch.tensor([0]) if name == "class_focal" else torch.full((1, 2), target)
    (gradient,) = torch.autograd.grad(build(name, gamma=gamma)(output, truth).sum(), output)
    assert bool(gradient.isfinite().all())


def test_adjusted_logits_are_bayes_rule() -> None:
    # logits of the likelihood: adjusted by the priors they are the posterior
    priors = torch.tensor([0.7, 0.2, 0.1]).double()
    likelihood = torch.rand(6, 3, dtype=torch.float64)
    posterior = likelihood * priors / (likelihood @ priors)[:, None]
    target = torch.arange(6) % 3
    found = build("logit_adjusted", priors=(100 * priors).tolist())(likelihood.log(), target)
    torch.testing.assert_close(found, -posterior[torch.arange(6), target].log())
    same = build("logit_adjusted", priors=[1.0] * 3)(likelihood.log(), target)
    torch.testing.assert_close(same, F.cross_entropy(likelihood.log(), target, reduction="none"))


# ---- what may be missing


@pytest.mark.parametrize(
    "name", [n for n in VECTORS if LOSS_TABLE[n].targets in ("multilabel", "continuous")]
)
@given(missing=st.lists(st.booleans(), min_size=K, max_size=K))
@settings(max_examples=20, deadline=None)
def test_missing_targets_are_as_if_not_asked(name: str, missing: list[bool]) -> None:
    output, target = drawn(name)
    target = target.nan_to_num(0.0)
    gone = torch.tensor(missing)
    target[0, gone] = torch.nan
    output.requires_grad_()
    found = build(name)(output, target)
    (gradient,) = torch.autograd.grad(found.sum(), output)
    assert not gradient[0, gone].any()
    assert bool(gradient.isfinite().all())
    if all(missing):
        assert found[0] == 0
    else:
        asked = build(name)(output[:1, ~gone], target[:1, ~gone])
        torch.testing.assert_close(found[:1], asked)


def test_multilabel_is_scikit_learns() -> None:
    output, target = drawn("multilabel_bce")
    target = target.nan_to_num(1.0)
    found = build("multilabel_bce")(output, target)
    chances = torch.stack([1 - output.sigmoid(), output.sigmoid()], 2)
    wanted = [log_loss(t, p, labels=[0, 1]) for t, p in zip(target, chances, strict=True)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_a_positive_label_counts_its_weight() -> None:
    output, _ = drawn("multilabel_bce")
    weights = [1.0, 2.0, 3.0, 4.0]
    found = build("multilabel_bce", positive=weights)(output, torch.ones(B, K, dtype=torch.float64))
    torch.testing.assert_close(found, (-output.sigmoid().log() * torch.tensor(weights)).mean(1))


def test_multilabel_focal_is_monais() -> None:
    output, target = drawn("multilabel_focal")
    target = target.nan_to_num(1.0)
    oracle = FocalLoss(gamma=2.0, reduction="none")(output, target).mean(1)
    torch.testing.assert_close(build("multilabel_focal")(output, target), oracle.double())


def test_errors_are_scikit_learns() -> None:
    output, target = drawn("squared_error")
    target = target.nan_to_num(0.3)
    for name, oracle in (("squared_error", mean_squared_error), ("absolute_error", mean_absolute_error)):
        wanted = [oracle(t, o) for t, o in zip(target, output, strict=True)]
        np.testing.assert_allclose(build(name)(output, target), wanted, rtol=1e-12)
    torch.testing.assert_close(
        build("huber", delta=1e6)(output, target), build("squared_error")(output, target) / 2
    )


# ---- levels


def test_ordinal_is_the_sum_of_its_thresholds() -> None:
    output = torch.tensor([[5.0, 1.0, -2.0]], dtype=torch.float64)
    for level, signs in enumerate(([-1, -1, -1], [1, -1, -1], [1, 1, -1], [1, 1, 1])):
        wanted = -(torch.tensor(signs) * output[0]).sigmoid().log().mean()
        found = build("ordinal")(output, torch.tensor([level]))
        torch.testing.assert_close(found[0], wanted)


def test_the_best_constant_thresholds_are_the_shares_above() -> None:
    target = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    above = torch.stack([(target > j).double().mean() for j in range(3)])
    output = above.logit().expand(8, 3).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(build("ordinal")(output, target).sum(), output)
    assert gradient.sum(0).abs().max() < 1e-12


# ---- refusals


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"name": "class_cross_entropy", "smoothing": 1},
            r"loss\.smoothing is 1; input should be less than 1",
        ),
        ({"name": "class_cross_entropy", "weights": [1, 0]}, r"loss\.weights.*greater than 0"),
        ({"name": "class_focal", "gamma": -1}, r"loss\.gamma is -1"),
        ({"name": "logit_adjusted"}, r"loss\.priors"),
        ({"name": "huber", "delta": 0}, r"loss\.delta is 0"),
    ],
)
def test_bad_settings_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(Stop, match=message):
        LOSSES.build(Section(**section))


def test_numbers_for_other_classes_are_refused() -> None:
    output, target = drawn("class_cross_entropy")
    with pytest.raises(ValueError, match=r"loss\.weights has 2 numbers; the model has 4 outputs"):
        build("class_cross_entropy", weights=[1, 2])(output, target)
