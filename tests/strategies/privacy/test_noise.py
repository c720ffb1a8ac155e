"""Noise and sampling: against scipy's distributions, and against every seed there is."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor

from strategies.privacy import noise

MILLION = 10**6


def either(check: Callable[[], bool]) -> bool:
    """A test that a right generator fails once in a thousand times fails here once in a million."""
    return check() or check()


def test_it_is_normal() -> None:
    def check() -> bool:
        drawn = noise.normal(MILLION).numpy()
        return bool(
            drawn.dtype == np.float64
            and abs(drawn.std() - 1) < 0.01
            and abs(drawn.mean()) < 0.005
            and stats.kstest(drawn, "norm").pvalue > 0.001
            # the two that Box and Muller make of one pair, and neighbours
            and abs(np.corrcoef(drawn[: MILLION // 2], drawn[MILLION // 2 :])[0, 1]) < 0.005
            and abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.005
        )

    assert either(check)


def test_its_tails_are_there() -> None:
    def check() -> bool:
        drawn = noise.normal(2 * MILLION).abs()
        return all(
            abs(int((drawn > bound).sum()) - (mean := 2 * MILLION * 2 * stats.norm.sf(bound))) < 5 * mean**0.5
            for bound in (2.0, 3.0, 4.0)
        )

    assert either(check)


@pytest.mark.parametrize("count", [0, 1, 7, noise._BLOCK, noise._BLOCK + 1])
def test_as_many_as_were_asked_for_and_none_twice(count: int) -> None:
    drawn = noise.normal(count)
    assert drawn.shape == (count,)
    assert len(set(drawn.tolist())) == count
    assert noise.chosen(count, 0.5).shape == (count,)


@pytest.mark.parametrize("draw", [lambda: noise.normal(8), lambda: noise.chosen(200, 0.5)])
def test_no_seed_has_a_say(draw: Callable[[], Tensor]) -> None:
    found = []
    for _ in range(3):
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        before = torch.get_rng_state()
        found.append(draw())
        assert torch.get_rng_state().equal(before)
    assert not any(a.equal(b) for a, b in ((found[0], found[1]), (found[0], found[2]), (found[1], found[2])))


def _told(pipe: Connection) -> None:
    pipe.send(noise.normal(4).tolist())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes_draw_different_noise() -> None:
    noise.normal(4)
    context, said = multiprocessing.get_context("fork"), []
    for _ in range(2):
        here, there = context.Pipe()
        process = context.Process(target=_told, args=(there,))
        process.start()
        said.append(here.recv())
        process.join()
    assert said[0] != said[1]


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.3, 1.0])
def test_everybody_takes_part_with_the_same_probability(rate: float) -> None:
    def check() -> bool:
        taken = int(noise.chosen(MILLION, rate).sum())
        return bool(abs(taken - rate * MILLION) <= 5 * (rate * (1 - rate) * MILLION) ** 0.5)

    assert either(check)
