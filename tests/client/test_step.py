"""The learning rate over rounds, and torch's deterministic mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from client.step import SCHEDULES, rate, repeatable
from strategies.protocol import pack
from tests.toys import Toys, toy_cases, toy_plan

FILL = "fill_uninitialized_memory"
#: of 12 rounds of 4 steps, step by step, `k` counted from 0
RATES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "constant": ({}, lambda _: 1.0),
    "cosine": ({}, lambda k: (1 + math.cos(math.pi * k / 48)) / 2),
    "step": ({"decay": 0.5, "drops": 3}, lambda k: 0.5 ** (k // 12)),
    "polynomial": ({"power": 2.0}, lambda k: (1 - k / 48) ** 2),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_of_each_step_is_its_closed_form(name: str) -> None:
    given, expected = RATES[name]
    made = toy_plan(local={"schedule": name, "lr": 0.3, **given}, federation={"rounds": 12})
    got = [rate(made, (r + step / 4) / 12) for r in range(12) for step in range(4)]
    assert got == pytest.approx([0.3 * expected(k) for k in range(48)])


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_rises_over_the_first_rounds_and_then_goes_its_way(name: str) -> None:
    given, _ = RATES[name]
    local = {"schedule": name, "lr": 0.3, **given}
    warm = toy_plan(local={**local, "warmup_rounds": 3}, federation={"rounds": 12})
    alone = toy_plan(local=local, federation={"rounds": 9})
    got = [rate(warm, (r + step / 4) / 12) for r in range(12) for step in range(4)]
    assert got[:12] == pytest.approx([0.3 * (k + 1) / 12 for k in range(12)])
    assert got[12:] == pytest.approx([rate(alone, k / 36) for k in range(36)])
    # rounds of warming up, and nothing else
    assert rate(toy_plan(local={**local, "warmup_rounds": 99}), 0.999) <= 0.3 * 1.1


def test_deterministic_mode_is_on_inside_and_as_it_was_outside() -> None:
    def now() -> tuple[bool, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.backends.cudnn.benchmark,
            getattr(torch.utils.deterministic, FILL),
        )

    before = now()

    def fail() -> None:
        with repeatable(True):
            assert now() == (True, False, False, False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert now() == before
    with repeatable(False):
        assert now() == before


def test_training_in_it_gives_the_same_bits_on_a_cpu(ram: Path) -> None:
    seen: list[bool] = []

    def models(on: bool) -> bytes:
        made = toy_plan(task="tiny_net", local={"deterministic": on}, federation={"rounds": 1})
        toys = Toys(ram / str(on), made, toy_cases(1, 3))
        with toys.opened(lambda *_: seen.append(torch.are_deterministic_algorithms_enabled())) as run:
            return pack(run.train().model)

    assert models(True) == models(False)
    assert not any(seen)
