"""DP-SGD: how far one patient moves a sum, against gradients taken one at a time by plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from strategies.privacy import noise
from strategies.privacy.dpsgd import Clipper, Mechanism, factors
from tasks.base import Batch, Phase
from tasks.models import GRADIENTS
from tasks.supervision import deep
from tests.small_networks import ENTRIES, sides, small
from tests.toys import toy_plan

ODD = {"nan": float("nan"), "inf": float("inf"), "huge": 1e30, "largest": 3e38}


def loss(model: nn.Module, batch: Batch | None) -> Tensor:
    if batch is None:
        raise ValueError("needs a batch")
    value: Tensor = (model(batch["x"]) - batch["y"]).square().flatten(1).mean(1)
    return value


def side_outputs(model: nn.Module, batch: Batch | None) -> Tensor:
    if batch is None:
        raise ValueError("needs a batch")
    return deep(
        lambda made, wanted: (made - wanted).square().flatten(1).mean(1), model(batch["x"]), batch["y"]
    )


PHASE, DEEP = Phase("train", loss), Phase("train", side_outputs)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def patient(seed: int, examples: int = 1, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    x, y = (scale * torch.randn(examples, n, generator=draw, dtype=dtype) for n in (3, 2))
    return {"x": x, "y": y}


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.reshape(-1).double() for g in gradients.values()])


@cache  # a sum leaves nothing in it
def clipper(dtype: torch.dtype, clip: float, mapped: bool, chunk: int) -> Clipper:
    return Clipper(PHASE, net(dtype), clip=clip, chunk=chunk, mapped=mapped)


def total(patients: Sequence[Batch], clip: float = 1.0, *, mapped: bool = True, chunk: int = 0) -> Tensor:
    dtype = patients[0]["x"].dtype if patients else torch.float32
    return flat(clipper(dtype, clip, mapped, chunk).total(patients))


def by_hand(patients: Sequence[Batch], clip: float) -> Tensor:
    """The definition: mean gradient of a patient, clipped, summed."""
    found = torch.zeros(26, dtype=torch.float64)
    for one in patients:
        model = net(one["x"].dtype)
        loss(model, one).mean().backward()  # type: ignore[no-untyped-call]
        gradient = torch.cat([p.grad.reshape(-1).double() for p in model.parameters() if p.grad is not None])
        found += gradient * min(1.0, clip / float(gradient.norm()))
    return found


# ---- how far one patient moves the sum


@given(
    st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 100.0])), max_size=5),
    st.sampled_from(["plain", "crops", *ODD]),
    st.integers(0, 5),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.booleans(),
    st.sampled_from([0, 1, 2]),
)
@settings(max_examples=1000, deadline=None)
def test_one_patient_moves_the_sum_by_the_clip_norm_at_most(
    others: list[tuple[int, float]], kind: str, place: int, clip: float, mapped: bool, chunk: int
) -> None:
    rest = [patient(seed, scale=scale) for seed, scale in others]
    one = patient(7, 8 if kind == "crops" else 1, scale=50.0)
    if kind in ODD:
        one = {**one, "x": one["x"].clone()}
        one["x"][0, 1] = ODD[kind]
    place = min(place, len(rest))
    without = total(rest, clip, mapped=mapped, chunk=chunk)
    moved = total([*rest[:place], one, *rest[place:]], clip, mapped=mapped, chunk=chunk) - without
    assert float(moved.norm()) <= clip * (1 + 1e-6)
    assert without.isfinite().all()


@pytest.mark.parametrize("mapped", [True, False])
def test_a_patient_whose_gradient_is_not_finite_counts_nothing(mapped: bool) -> None:
    rest = [patient(1), patient(2)]
    for value in ODD.values():
        bad = {"x": torch.full((1, 3), value), "y": torch.zeros(1, 2)}
        if value == 1e30:
            bad["y"] = torch.full((1, 2), 1e30)  # Tanh holds the input: let the output be too far
        assert total([*rest, bad], mapped=mapped).isfinite().all()
    nan = {"x": torch.full((1, 3), float("nan")), "y": torch.zeros(1, 2)}
    assert total([rest[0], nan, rest[1]], mapped=mapped).equal(total(rest, mapped=mapped)) or torch.allclose(
        total([rest[0], nan, rest[1]], mapped=mapped), total(rest, mapped=mapped), rtol=1e-6
    )


def test_norms_are_float64s() -> None:
    # 1e-4 in 33 million places: summed one after the other in float32 the norm comes out too small
    wide = torch.full((1, 2**22), 1e-2)
    share, whole = factors([wide, wide], 1.0)
    assert bool(whole)
    norm = (2 * 2**22 * float(wide[0, 0].double()) ** 2) ** 0.5
    assert float(share) == pytest.approx(1 / norm, rel=1e-9)
    assert float(factors([torch.zeros(1, 3)], 1.0)[0]) == 1.0


# ---- what is summed


@pytest.mark.parametrize(("mapped", "chunk"), [*product([True, False], [0, 1, 2, 3, 9])])
def test_the_sum_is_the_definitions(mapped: bool, chunk: int) -> None:
    dtype = torch.float64
    patients = [patient(s, e, 10.0**k, dtype) for s, e, k in ((1, 1, -1), (2, 1, 1), (3, 4, 0), (4, 4, 1))]
    for clip in (0.3, 1e3):
        got = total(patients, clip, mapped=mapped, chunk=chunk)
        assert (got - by_hand(patients, clip)).abs().max() < 1e-12
    assert not total([], mapped=mapped, chunk=chunk).any()


@pytest.mark.parametrize("crops", [2, 4, 8])
def test_examples_of_a_patient_are_averaged(crops: int) -> None:
    one = patient(3, dtype=torch.float64)
    many = {name: tensor.repeat(crops, 1) for name, tensor in one.items()}
    assert (total([one], 1e6) - total([many], 1e6)).abs().max() < 1e-12


@pytest.mark.parametrize(("name", "dimensions"), [e for e in ENTRIES if GRADIENTS[e[0]] == "vmap"])
def test_every_map_network_that_says_so_is_mapped(name: str, dimensions: int) -> None:
    model = small(name, dimensions).double()
    shape = (1, 1, *sides(name, dimensions))
    patients = [{"x": torch.randn(shape).double(), "y": torch.rand(1, 2, *shape[2:]).double()} for _ in "ab"]
    mapped, looped = (Clipper(DEEP, model, clip=1e9, mapped=m).total(patients) for m in (True, False))
    for key, value in looped.items():
        assert (mapped[key] - value).abs().max() <= 1e-10, key
    assert all(isinstance(p, nn.Parameter) for p in model.parameters()), "the model itself stays a model"


@pytest.mark.parametrize("value", ["nan", "inf", "huge"])
def test_one_broken_patient_does_not_reach_the_others_of_its_pass(value: str) -> None:
    model = small("unet", 2)
    draw = torch.Generator().manual_seed(0)
    rest = [
        {"x": torch.randn(1, 1, 16, 16, generator=draw), "y": torch.rand(1, 2, 16, 16, generator=draw)}
        for _ in range(3)
    ]
    broken = {"x": torch.full((1, 1, 16, 16), ODD[value]), "y": torch.full((1, 2, 16, 16), ODD[value])}
    clipper = Clipper(PHASE, model, clip=1.0, mapped=True)
    with_it, without = (flat(clipper.total(part)) for part in ([rest[0], broken, *rest[1:]], rest))
    assert float((with_it - without).norm()) <= 1e-6


# ---- noise


def plan(**privacy: float) -> Mechanism:
    return Mechanism.of(
        toy_plan(
            local={"batch_size": 4},
            federation={"weight": "equal"},
            privacy={"mode": "dpsgd", "nominal_patients": 20, "sigma": 1.0, **privacy},
        )
    )


def test_rate_and_divisor_come_from_public_numbers() -> None:
    assert plan(sigma=1.5, clip=0.25) == Mechanism(sigma=1.5, clip=0.25, rate=0.2, expected=4.0)


def test_what_is_charged_does_not_depend_on_the_examples_of_a_patient() -> None:
    assert plan(examples=1) == plan(examples=8)


@pytest.mark.parametrize("size", [0, 1, 9])
def test_the_sum_is_noised_once_and_divided_by_the_expected_batch(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def ones(count: int) -> Tensor:
        drawn.append(count)
        return torch.ones(count, dtype=torch.float64)

    monkeypatch.setattr(noise, "normal", ones)
    summed = Clipper(PHASE, net(), clip=0.5, mapped=True).total([patient(s) for s in range(size)])
    made = plan(sigma=3.0, clip=0.5).privatise(summed, 0.5)
    assert drawn == [26]
    assert (flat(made) - (flat(summed) + 1.5) / 4).abs().max() < 1e-12
    assert {n: g.shape for n, g in made.items()} == {n: p.shape for n, p in net().named_parameters()}


def test_an_empty_batch_is_noised_like_any_other() -> None:
    nobody = {"w": torch.zeros(300, 400, dtype=torch.float64)}
    found = plan(sigma=2.0, clip=0.5).privatise(nobody, 0.5)["w"]
    assert float(found.std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.02)  # 120,000 values: ten deviations


def test_patients_are_drawn_at_the_rate_whoever_they_are() -> None:
    keys, mechanism = [str(i) for i in range(1000)], plan()
    sizes = [len(mechanism.sample(keys)) for _ in range(200)]
    assert abs(sum(sizes) - 200 * 200) < 5 * (200 * 1000 * 0.2 * 0.8) ** 0.5
    assert mechanism.sample([]) == []
    assert set(mechanism.sample(keys)) <= set(keys)
