"""Sums are exact, whatever the order; collections are on disk, and gone when closed."""

from __future__ import annotations

import math
import random
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conf.exits import Exit, Stop
from strategies import exact
from strategies.exact import MAX_ADDS, Collect, Partial, Sum, Total, ring_bits
from strategies.protocol import Refused, Spec, Update
from strategies.robust import median

WEIGHT, VALUE = 4096, 64.0
SPEC = Spec(
    {
        "delta/w": ((2, 2), torch.float32),
        "delta/b": ((), torch.float32),
        "delta/none": ((0, 3), torch.float32),
        "control/w": ((3,), torch.float32),
    },
    WEIGHT,
    VALUE,
)
FOLD = Sum(counted=frozenset({"control"}), age_power=0.5)


def flat(update: Update, spec: Spec = SPEC) -> list[float]:
    return [float(x) for name in spec.tensors for x in update.tensors[name].reshape(-1)]


def unflat(values: list[float], weight: int, spec: Spec = SPEC) -> Update:
    made, at = {}, 0
    for name, (shape, dtype) in spec.tensors.items():
        size = math.prod(shape)
        made[name] = torch.tensor(values[at : at + size], dtype=dtype).reshape(shape)
        at += size
    return Update(made, weight)


Answer = tuple[Update, int]  # and its age


@st.composite
def answers(draw: st.DrawFn) -> list[Answer]:
    value = st.floats(-VALUE, VALUE, width=32) | st.sampled_from((VALUE, -VALUE, 0.0, -0.0, 2.0**-33, 1e-30))
    found = []
    for _ in range(draw(st.integers(1, 7))):
        values = draw(st.lists(value, min_size=SPEC.size, max_size=SPEC.size))
        weight = draw(st.integers(1, WEIGHT) | st.just(WEIGHT))
        found.append((unflat(values, weight), draw(st.integers(0, 3))))
    return found


def units(fold: Sum, weight: int, age: int) -> Fraction:
    """How much an answer counts: its weight times (1 + age)^-power, that in 256ths."""
    return weight * Fraction(max(1, round(256 * (1 + age) ** -fold.age_power)), 256)


def oracle(found: list[Answer], fold: Sum, spec: Spec = SPEC) -> list[int]:
    """Σ round_half_even(weight · x · 2^bits), in rational numbers."""
    groups = [
        name.partition("/")[0] for name, (shape, _) in spec.tensors.items() for _ in range(math.prod(shape))
    ]
    scale = 2 ** ring_bits(spec.max_weight, spec.max_value)
    total = [0] * spec.size
    for update, age in found:
        for i, (group, x) in enumerate(zip(groups, flat(update, spec), strict=True)):
            weight = Fraction(1) if group in fold.counted else units(fold, update.weight, age)
            total[i] += round(Fraction(x) * weight * scale)
    return total


def folded(found: list[Answer], fold: Sum = FOLD, spec: Spec = SPEC, offset: int = 0) -> Partial:
    partial = fold.start(spec)
    for i, (update, age) in enumerate(found):
        spec.check(update)
        fold.add(partial, spec, f"s{offset + i}", (1, 0), update, age)
    return partial


def means_of(total: Total) -> dict[str, Tensor]:
    return {f"{group}/{n}": t for group in ("delta", "control") for n, t in total.mean(group).items()}


@given(answers(), st.randoms(use_true_random=False), st.sampled_from((1, 3, 2**16)))
@settings(max_examples=100, deadline=None)
def test_any_order_grouping_and_block_gives_the_exact_sum(
    found: list[Answer], draw: random.Random, block: int
) -> None:
    shuffled = draw.sample(found, len(found))
    cuts = sorted(draw.choices(range(len(found) + 1), k=draw.randint(0, 4)))
    edges = [0, *cuts, len(found)]
    with patch.object(exact, "_BLOCK", block):
        partials = [folded(shuffled[a:b], offset=a) for a, b in pairwise(edges)]  # some of them empty
        while len(partials) > 1:  # a random tree of merges
            into = partials.pop(draw.randrange(len(partials)))
            other = partials.pop(draw.randrange(len(partials)))
            FOLD.merge(into, other)
            partials.append(into)
        total = FOLD.finish(partials[0], SPEC)
        means = means_of(total)
    assert (total.ring - total.bias).tolist() == oracle(found, FOLD)
    assert Fraction(total.weight) == sum(units(FOLD, u.weight, age) for u, age in found)
    assert total.count == len(found)
    for name, tensor in means_of(FOLD.finish(folded(found), SPEC)).items():
        assert tensor.equal(means[name])


@given(answers())
@settings(max_examples=60, deadline=None)
def test_means_are_by_weight_or_by_count(found: list[Answer]) -> None:
    total = FOLD.finish(folded(found), SPEC)
    weights = [units(FOLD, u.weight, age) for u, age in found]
    rows = [flat(u) for u, _ in found]
    step = Fraction(1, 2 ** ring_bits(WEIGHT, VALUE))
    for group, by in (("delta", weights), ("control", [Fraction(1)] * len(found))):
        columns = range(5) if group == "delta" else range(5, 8)
        got = [float(x) for t in total.mean(group).values() for x in t.reshape(-1)]
        for x, i in zip(got, columns, strict=True):
            mean = sum((Fraction(r[i]) * w for r, w in zip(rows, by, strict=True)), Fraction(0)) / sum(by)
            # each answer is rounded to the ring's step, the mean to float32
            assert abs(Fraction(x) - mean) <= step * len(found) / sum(by) + abs(mean) * Fraction(1, 2**23)
    assert {n: t.shape for n, t in total.mean("delta").items()} == {"w": (2, 2), "b": (), "none": (0, 3)}


@given(st.lists(st.floats(-(2.0**31), 2.0**31), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_float64_sums_are_exact(values: list[float]) -> None:
    spec = Spec({"sums/n": ((), torch.float64)}, 1, 2.0**31)
    found = [(unflat([v], 1, spec), 0) for v in values]
    total = Sum().finish(folded(found, Sum(), spec), spec)
    assert (total.ring - total.bias).tolist() == oracle(found, Sum(), spec)
    got = total.sum("sums")["n"]
    assert got.dtype == torch.float64
    error = abs(Fraction(float(got)) - sum(map(Fraction, values)))
    assert error <= Fraction(len(values), 2**20) + Fraction(2**-18)  # the ring's step, and float64's


def test_whole_numbers_add_without_any_error() -> None:
    spec = Spec({"sums/n": ((3,), torch.float64)}, 1, 2.0**31)
    rows = [[2.0**31, 3.0, -(2.0**31)], [1.0, 4.0, 0.0], [2.0**31 - 1, -7.0, 5.0]]
    total = Sum().finish(folded([(unflat(r, 1, spec), 0) for r in rows], Sum(), spec), spec)
    assert total.sum("sums")["n"].tolist() == [2.0**32, 0.0, 5.0 - 2.0**31]


# ---- room in the ring


@given(st.integers(1, 2**20), st.floats(2.0**-20, 2.0**20))
@settings(max_examples=200, deadline=None)
def test_the_largest_answers_fit_and_no_place_is_given_away(weight: int, value: float) -> None:
    largest = Fraction(value) * weight
    # rounding both logarithms up may cost a factor of four in all
    if largest * 2**16 * MAX_ADDS * 4 > 2**62:
        with suppress(Stop):
            ring_bits(weight, value)
        return
    bits = ring_bits(weight, value)
    assert 16 <= bits <= 32
    assert largest * 2**bits <= 2**51  # the magic number's room
    assert largest * 2**bits * MAX_ADDS < 2**63  # the sum's
    assert bits == 32 or largest * 2 ** (bits + 1) * MAX_ADDS * 4 > 2**62


def test_no_room_names_both_settings() -> None:
    with pytest.raises(
        Stop, match=r"max_weight 1048576 times max_value 1.04858e\+06 leaves 10 binary"
    ) as stop:
        ring_bits(2**20, 2.0**20)
    assert stop.value.exit is Exit.CONFIG


@pytest.mark.parametrize("sign", [1, -1])
def test_as_many_extreme_answers_as_there_is_room_for_are_exact_and_one_more_is_refused(sign: int) -> None:
    spec = Spec({"delta/w": ((3,), torch.float32)}, WEIGHT, VALUE)
    third = float(torch.tensor(VALUE / 3))
    update = unflat([sign * VALUE, sign * third, -VALUE], WEIGHT, spec)
    fold = Sum()
    partials = [fold.start(spec) for _ in range(3)]
    for i in range(MAX_ADDS):
        fold.add(partials[i % 3], spec, f"s{i}", (1, 0), update)
    extra = fold.start(spec)
    fold.add(extra, spec, "extra", (1, 0), update)
    for partial in partials[1:]:
        fold.merge(partials[0], partial)
    with pytest.raises(ValueError, match="room for 4096 answers"):
        fold.add(partials[0], spec, "extra", (1, 0), update)
    with pytest.raises(ValueError, match="room for 4096 answers"):
        fold.merge(partials[0], extra)
    total = fold.finish(partials[0], spec)
    assert (total.ring - total.bias).tolist() == [MAX_ADDS * n for n in oracle([(update, 0)], fold, spec)]
    assert total.mean("delta")["w"].tolist() == [sign * VALUE, sign * third, -VALUE]


def test_at_the_limit_of_the_range_a_sum_is_exact_and_past_it_refused() -> None:
    for value, weight in ((64.0, 4096), (0.1, 7), (2.0**20, 1), (1000.0, 2**15)):
        spec = Spec({"delta/w": ((1,), torch.float64)}, weight, value)
        found = [(unflat([value], weight, spec), 0), (unflat([-value], weight, spec), 0)] * 3
        scale = 2 ** ring_bits(weight, value)
        total = Sum().finish(folded(found[:5], Sum(), spec), spec)
        # a float64 times a weight is rounded once more, to 53 bits, before the ring
        assert abs(int(total.ring[0] - total.bias) - Fraction(value) * weight * scale) <= 5
        with pytest.raises(Refused, match="range"):
            spec.check(unflat([math.nextafter(value, math.inf)], weight, spec))
        with pytest.raises(Refused, match="range"):
            spec.check(unflat([-math.nextafter(value, math.inf)], weight, spec))
        with pytest.raises(Refused, match="weight"):
            spec.check(unflat([value], weight + 1, spec))


def test_an_old_answer_counts_less_but_never_nothing() -> None:
    fold = Sum(age_power=0.5)
    spec = Spec({"delta/w": ((1,), torch.float32)}, WEIGHT, VALUE)
    found = [(unflat([1.0], 2, spec), 0), (unflat([4.0], 2, spec), 3)]
    total = fold.finish(folded(found, fold, spec), spec)
    assert total.weight == 3.0
    assert float(total.mean("delta")["w"]) == 2.0
    steep = Sum(age_power=100.0)
    total = steep.finish(folded([(unflat([4.0], 2, spec), 50)], steep, spec), spec)
    assert float(total.mean("delta")["w"]) == 4.0


def test_a_sum_and_a_collection_do_not_merge() -> None:
    with pytest.raises(ValueError, match="cannot merge a sum with a collection"):
        Sum().merge(Sum().start(SPEC), Collect().start(SPEC))
    with pytest.raises(ValueError, match="not a sum"):
        Sum().finish(Collect().start(SPEC), SPEC)


# ---- collections

TABLE = Spec(
    {
        "delta/a": ((7,), torch.float32),
        "other/n": ((2,), torch.float64),
        "delta/b": ((), torch.float32),
        "delta/none": ((0,), torch.float32),
        "delta/c": ((3, 5), torch.float32),
    },
    9,
    8.0,
)


def table(n: int) -> dict[str, Update]:
    draw = torch.Generator().manual_seed(n)
    return {
        f"s{i}": Update(
            {
                name: torch.randn(shape, generator=draw, dtype=dtype)
                for name, (shape, dtype) in TABLE.tensors.items()
            },
            i % 9 + 1,
        )
        for i in range(n)
    }


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 10])
def test_the_median_of_blocks_is_numpys_median(
    n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(exact, "_ROWS", 4 * n)  # 4 columns a block: 7 and 15 end within one
    fold, rows = Collect(), table(n)
    partials = [fold.start(TABLE), fold.start(TABLE)]
    for i, site in enumerate(reversed(rows)):
        fold.add(partials[i % 2], TABLE, site, (3, 1), rows[site], age=i)
    fold.merge(partials[0], partials[1])
    widths: list[int] = []

    def rule(block: Tensor) -> Tensor:
        widths.append(block.shape[1])
        return median(block)

    with fold.finish(partials[0], TABLE) as collected:
        got = collected.reduce("delta", rule)
        assert list(collected.rows) == sorted(rows)
        assert collected.weights == {site: update.weight for site, update in sorted(rows.items())}
        assert collected.count == n
        for site, update in rows.items():
            answer = collected.answer(site)
            assert all(answer[name].equal(update.tensors[name]) for name in TABLE.tensors)
        assert len(list(tmp_path.iterdir())) == n
    assert list(tmp_path.iterdir()) == []
    collected.close()  # twice is once
    assert sorted(widths) == sorted([4, 3, 1, 4, 4, 4, 3])
    assert list(got) == ["a", "b", "none", "c"]
    for name, tensor in got.items():
        stacked = np.stack([update.tensors[f"delta/{name}"].numpy() for update in rows.values()])
        assert np.array_equal(tensor.numpy(), np.median(stacked, axis=0)), name


def test_a_row_that_could_not_be_written_whole_is_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fold, partial = Collect(), Collect().start(TABLE)
    torn = {n: t for n, t in table(1)["s0"].tensors.items() if n != "delta/c"}
    with pytest.raises(KeyError, match="delta/c"):
        fold.add(partial, TABLE, "s0", (1, 0), Update(torn))
    assert len(list(tmp_path.iterdir())) == 1
    fold.finish(partial, TABLE).close()
    assert list(tmp_path.iterdir()) == []


def test_a_total_is_read_again_and_again() -> None:
    total: Total = FOLD.finish(folded([(unflat([1.0] * SPEC.size, 3), 0)]), SPEC)
    mean = total.mean("delta")
    assert len(mean) == 3
    assert mean["w"].equal(mean["w"])
    assert mean["w"].data_ptr() != mean["w"].data_ptr()
    assert float(total.sum("delta")["b"]) == 3.0
    assert float(total.sum("control")["w"][0]) == 1.0


def test_a_sum_of_nothing_has_no_limit() -> None:
    spec, fold = Spec({}, 1, 1.0), Sum()
    total = fold.start(spec)
    for half in range(2):
        partial = fold.start(spec)
        for i in range(MAX_ADDS // 2 + 1):
            fold.add(partial, spec, f"site-{half}-{i}", (1, 0), Update({}))
        fold.merge(total, partial)
    assert fold.finish(total, spec).count == MAX_ADDS + 2


def test_asking_for_a_tensor_that_is_there_computes_none() -> None:
    spec, fold = Spec({"delta/w": ((2,), torch.float32)}, 1, 1.0), Sum()
    partial = fold.start(spec)
    fold.add(partial, spec, "a", (1, 0), Update({"delta/w": torch.tensor([0.5, -0.25])}))
    mean = fold.finish(partial, spec).mean("delta")
    assert "w" in mean
    assert "v" not in mean
    assert mean["w"].tolist() == [0.5, -0.25]
