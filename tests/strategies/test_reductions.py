"""Where an algorithm is another one in disguise it gives the same bits; and what it must not depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.exits import Exit, Stop
from conf.schema import Plan, Section
from server.checkpoint import Progress
from strategies import STRATEGIES, build_strategy
from strategies.base import Strategy
from strategies.protocol import pack
from tasks.base import Case
from tests.toys import Toys, toy_case, toy_cases, toy_plan

Cases = Mapping[str, Mapping[str, Sequence[Case]]]


def train(folder: Path, plan: Plan, cases: Cases, *, evaluate: bool = False, workers: int = 1) -> Progress:
    with Toys(folder, plan, cases, workers=workers).opened() as run:
        progress: Progress = run.train(evaluate=evaluate)
    return progress


def plan(strategy: str, /, *, norm: bool = True, **sections: Any) -> Plan:
    """Two rounds of the network over three sites each, in mini-batches, with momentum and clipping."""
    return toy_plan(
        strategy,
        task="tiny_net",
        toy={"norm": norm},
        local={"steps": 3, "momentum": 0.5, "clip_norm": 0.3},
        **{"federation": {"rounds": 2, "cohort": 3}, **sections},
    )


REDUCTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "without its pull": ("fedprox", {"strategy": {"mu": 0.0}}),
    "the shared part beside personal models": ("ditto", {}),
    "without normalisation layers": ("fedbn", {"norm": False}),
    "with nothing kept": ("fedper", {}),
    "a buffer for all": ("fedbuff", {"strategy": {"buffer": 4}}),
    "the first round, all controls zero": ("scaffold", {"federation": {"rounds": 1, "cohort": 3}}),
}


@pytest.mark.parametrize("case", REDUCTIONS)
def test_it_is_fedavg_to_the_bit(case: str, ram: Path) -> None:
    name, sections = REDUCTIONS[case]
    cases = toy_cases(4, 2)
    other = train(ram / "other", plan(name, **sections), cases)
    fedavg = train(ram / "fedavg", plan("fedavg", **{**sections, "strategy": {}}), cases)
    assert pack(other.model) == pack(fedavg.model)


def test_the_median_of_identical_sites_is_fedavg_to_the_bit(ram: Path) -> None:
    # eighths and halves: no step rounds, so the mean of equal changes is that change
    splits = {
        split: [toy_case(split, torch.tensor([1.0, 0.5, 2.0]), torch.tensor([0.25, -3.0, 1.5]))]
        for split in ("train", "val", "test")
    }
    cases = dict.fromkeys(("a", "b", "c"), splits)
    local, federation = {"lr": 0.5, "steps": 2}, {"rounds": 2}
    models = [
        train(ram / name, toy_plan(name, local=local, federation=federation), cases).model
        for name in ("median", "fedavg")
    ]
    assert models[0]["w"].tolist() != [0.0, 0.0, 0.0]
    assert pack(models[0]) == pack(models[1])


def test_other_strategies_are_not_fedavg(ram: Path) -> None:
    """The reductions above would say nothing if any two runs were alike."""
    cases = toy_cases(4, 2)
    # Flower's are held to brute force in test_flower.py; some are each other without hostile sites
    names = [name for name in STRATEGIES if not name.startswith("flower_")]
    models = {name: pack(train(ram / name, plan(name), cases).model) for name in names}
    assert models.pop("ditto") == models["fedavg"]
    assert models.pop("fedper") == models["fedavg"]  # told to keep nothing
    assert len(set(models.values())) == len(models)


# ---- the whole table


@pytest.mark.parametrize("name", STRATEGIES)
def test_results_depend_neither_on_workers_nor_on_the_run(name: str, ram: Path) -> None:
    cases = toy_cases(4, 2)
    endings = {}
    for workers in (1, 3):  # more than one, and not as many as divide the sites
        toys = Toys(ram / str(workers), plan(name), cases, workers=workers, run_id=f"run{workers}")
        toys.train()
        endings[workers] = toys.ending()
        if workers == 1:
            assert set(endings[1]) == {
                "model.safetensors",
                "strategy.safetensors",
                "state.json",
                "metrics.jsonl",
            }
    assert endings[3] == endings[1]


@pytest.mark.parametrize("name", STRATEGIES)
def test_evaluating_does_not_change_training(name: str, ram: Path) -> None:
    cases = toy_cases(3, 2)
    often, never = (
        train(
            ram / str(every),
            plan(name, federation={"rounds": 2, "evaluate_every": every}),
            cases,
            evaluate=every > 0,
        )
        for every in (1, 0)
    )
    assert pack(often.model) == pack(never.model)
    assert pack(often.state) == pack(never.state)
    assert often.settled == never.settled


# ---- settings

OUT_OF_RANGE: dict[tuple[str, str], tuple[Any, ...]] = {
    ("fedprox", "mu"): (-0.1, "much", None),
    ("fedadam", "lr"): (0, -1),
    ("fedadam", "beta1"): (-0.1, 1),
    ("fedadam", "beta2"): (-0.1, 1, 2),
    ("fedadam", "tau"): (0,),
    ("fedper", "keep"): (1, "head"),
    ("scaffold", "lr"): (0, -1),
    ("ditto", "lam"): (-1,),
    ("fedbuff", "buffer"): (0, 1.5),
    ("fedbuff", "power"): (-0.5,),
    ("sums", "predictor"): ("", 1),
    ("flower_krum", "hostile"): (-1, 0.5),
    ("flower_multi_krum", "hostile"): (-1,),
    ("flower_multi_krum", "select"): (0,),
    ("flower_bulyan", "hostile"): (-1,),
    ("flower_trimmed_avg", "hostile"): (-1,),
    ("flower_qfedavg", "q"): (-0.1,),
    ("flower_qfedavg", "lr"): (0,),
    ("flower_fedavgm", "lr"): (0, -1),
    ("flower_fedavgm", "momentum"): (-0.1, 1),
    ("flower_fedadagrad", "lr"): (0,),
    ("flower_fedadagrad", "tau"): (0,),
    ("flower_fedadam", "lr"): (0,),
    ("flower_fedadam", "beta1"): (-0.1, 1),
    ("flower_fedadam", "beta2"): (-0.1, 1),
    ("flower_fedadam", "tau"): (0,),
    ("flower_fedyogi", "lr"): (0,),
    ("flower_fedyogi", "beta1"): (-0.1, 1),
    ("flower_fedyogi", "beta2"): (-0.1, 1),
    ("flower_fedyogi", "tau"): (0,),
}


@pytest.mark.parametrize(("name", "setting"), OUT_OF_RANGE)
def test_a_setting_out_of_range_is_refused_by_name(name: str, setting: str) -> None:
    for value in OUT_OF_RANGE[name, setting]:
        with pytest.raises(Stop, match=rf"^strategy\.{setting} is {value!r}; ") as stop:
            build_strategy(toy_plan(name, strategy={setting: value}))
        assert stop.value.exit is Exit.CONFIG


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_setting_has_a_case_and_an_unknown_one_is_refused(name: str) -> None:
    built = build_strategy(toy_plan(name))
    assert isinstance(built, Strategy)
    assert {f.name for f in fields(built)} == {setting for n, setting in OUT_OF_RANGE if n == name}  # type: ignore[arg-type]
    with pytest.raises(Stop, match=r"^strategy\.momentun is not a setting"):
        build_strategy(toy_plan(name, strategy={"momentun": 0.9}))
    with pytest.raises(AttributeError, match=r"cannot assign|no attribute"):
        built.stateful = True  # frozen: memory is explicit state


def test_an_unknown_strategy_lists_the_known_ones() -> None:
    with pytest.raises(Stop, match="strategy is 'fedsgd'; known: " + ", ".join(sorted(STRATEGIES))) as stop:
        build_strategy(toy_plan().model_copy(update={"strategy": Section(name="fedsgd")}))
    assert stop.value.exit is Exit.UNKNOWN_NAME


def test_bounds_that_leave_no_room_in_a_sum_are_refused_at_once() -> None:
    bounds = {"max_weight": 2**20, "max_value": 2.0**20}
    with pytest.raises(Stop, match=r"federation\.max_weight 1048576 times max_value"):
        build_strategy(toy_plan("fedavg", federation=bounds))
    build_strategy(toy_plan("median", federation=bounds))  # sums nothing
