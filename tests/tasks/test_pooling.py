"""Pools over instances: one bag at a time, against numpy, torch and what they are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conf.exits import Stop
from conf.schema import Section
from tasks.models import POOLS
from tasks.networks.pooling import AttentionPool, InstancePool

B, N, F = 4, 5, 3
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()


def build(name: str, **more: Any) -> InstancePool:
    torch.manual_seed(0)
    made = POOLS.build(Section(name=name, **more), features=F)
    assert isinstance(made, InstancePool)
    return made.double()


def drawn(seed: int = 1) -> Tensor:
    return torch.randn(B, N, F, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", POOLS)
def test_each_bag_is_pooled_by_itself(name: str) -> None:
    pool, x = build(name), drawn()
    found = pool(x, MASK)
    assert found.shape == (B, pool.features)
    for i in range(B):
        alone = pool(x[i : i + 1, MASK[i]], torch.ones(1, int(MASK[i].sum()), dtype=torch.bool))
        torch.testing.assert_close(alone[0], found[i])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("name", POOLS)
def test_what_stands_where_nobody_is_changes_nothing(name: str, value: float) -> None:
    pool, x = build(name), drawn()
    wanted = pool(x, MASK)
    filled = x.masked_fill(~MASK.unsqueeze(2), value).requires_grad_()
    found = pool(filled, MASK)
    torch.testing.assert_close(found, wanted)
    (gradient, *others) = torch.autograd.grad(found.sum(), [filled, *pool.parameters()])
    assert not gradient[~MASK].any()
    assert all(bool(g.isfinite().all()) for g in (gradient, *others))


@pytest.mark.parametrize("name", POOLS)
def test_gradients_are_mapped_over_bags(name: str) -> None:
    pool, x = build(name), drawn()
    weights = {n: p.detach() for n, p in pool.named_parameters()}

    def single(given: dict[str, Tensor], bag: Tensor, mask: Tensor) -> Tensor:
        value: Tensor = torch.func.functional_call(pool, given, (bag[None], mask[None])).square().sum()
        return value

    mapped, inner = torch.func.vmap(torch.func.grad(single, (0, 1)), (None, 0, 0))(weights, x, MASK)
    for i in range(B):
        bag = x[i : i + 1].clone().requires_grad_()
        value = pool(bag, MASK[i : i + 1]).square().sum()
        looped = torch.autograd.grad(value, [bag, *pool.parameters()])
        assert (inner[i] - looped[0][0]).abs().max() <= 1e-10
        for name_, g in zip(weights, looped[1:], strict=True):
            assert (mapped[name_][i] - g).abs().max() <= 1e-10


@pytest.mark.parametrize("name", [name for name in POOLS if name != "lstm"])
def test_the_order_of_instances_does_not_matter(name: str) -> None:
    pool, x = build(name), drawn()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(pool(x[:, order], MASK[:, order]), pool(x, MASK))


# ---- each against another's


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=N, max_size=N), st.integers(1, N))
@settings(max_examples=30, deadline=None)
def test_quantiles_mean_and_maximum_are_numpys(values: list[float], count: int) -> None:
    shares = [0.0, 0.1, 0.5, 0.9, 1.0]
    x = torch.tensor(values).double().view(1, N, 1)
    mask = torch.arange(N).view(1, N) < count
    there = values[:count]
    found = POOLS.build(Section(name="quantiles", shares=shares), features=1)(x, mask)
    np.testing.assert_allclose(found[0], np.quantile(there, shares), atol=1e-12)
    assert POOLS.build(Section(name="mean"), features=1)(x, mask).item() == pytest.approx(np.mean(there))
    assert POOLS.build(Section(name="maximum"), features=1)(x, mask).item() == max(there)


@pytest.mark.parametrize("gated", [False, True])
def test_attention_is_the_papers(gated: bool) -> None:
    pool, x = build("gated_attention" if gated else "attention", hidden=4), drawn()
    assert isinstance(pool, AttentionPool)
    weights = pool.weights(x, MASK)
    for i in range(B):
        scores = []
        for h in x[i, MASK[i]]:
            seen = torch.tanh(pool.look.weight @ h + pool.look.bias)
            if pool.gate is not None:
                seen = seen * torch.sigmoid(pool.gate.weight @ h + pool.gate.bias)
            scores.append((pool.weigh.weight[0] @ seen).exp())
        wanted = torch.stack(scores) / sum(scores)
        torch.testing.assert_close(weights[i, MASK[i]], wanted)
        assert not weights[i, ~MASK[i]].any()
        torch.testing.assert_close(pool(x, MASK)[i], wanted @ x[i, MASK[i]])


def test_the_sequence_is_torchs_lstm() -> None:
    pool, x = build("lstm", hidden=6), drawn()
    oracle = nn.LSTM(F, 6, batch_first=True).double()
    for name, tensor in oracle.state_dict().items():
        tensor.copy_(pool.state_dict()[f"cell.{name.removesuffix('_l0')}"])
    for i in range(B):
        torch.testing.assert_close(pool(x, MASK)[i], oracle(x[i, MASK[i]])[0][-1])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(Stop, match=r"pool is 'median'; known: attention"):
        POOLS.build(Section(name="median"), features=F)
    with pytest.raises(Stop, match=r"pool\.shares.* less than or equal to 1"):
        build("quantiles", shares=[0.5, 1.5])
