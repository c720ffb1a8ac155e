"""Which round's model is the result: the last, the best on validation, a moving average; and when it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from conf.exits import Exit, Stop
from conf.schema import Plan
from server.checkpoint import RESULT, load, result
from server.evaluate import Metrics, check_metric
from strategies import build_strategy
from strategies.base import Study
from strategies.protocol import pack
from tests.toys import Toys, toy_cases, toy_plan

CASES = toy_cases(3, 3)
ROUNDS = 6


def plan(strategy: str = "fedavg", **federation: Any) -> Plan:
    """One site a round, so that the mean over all sites does not fall from round to round."""
    given = {"rounds": ROUNDS, "cohort": 1, "metric": "loss", **federation}
    return toy_plan(strategy, federation=given, local={"lr": 0.2})


def lines(folder: Path, split: str, model: str = "federated") -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in found if (r["split"], r["model"], r["site"]) == (split, model, "all")]


def loss(model: dict[str, Tensor], split: str) -> float:
    """By hand, over every patient of every site."""
    images = torch.stack([case.images["image"] for site in CASES.values() for case in site[split]]).double()
    return float((0.5 * images[:, 0] * (model["w"].double() - images[:, 1]) ** 2).sum(-1).mean())


def every(folder: Path, made: Plan) -> list[dict[str, Tensor]]:
    """The model after each round, from a run that keeps them all."""
    models = []

    def watch(event: str, _: int) -> None:
        if event == "checkpoint":
            models.append(run.progress.model)

    with Toys(folder, made, CASES).opened(watch) as run:
        run.train()
    return models


def test_the_best_round_on_validation_is_scored_on_test_and_kept(ram: Path) -> None:
    models = every(ram / "all", plan())
    values = [loss(model, "val") for model in models]
    best = min(range(ROUNDS), key=values.__getitem__)
    assert 1 <= best < ROUNDS - 2  # neither the first nor one of the two that are kept anyway
    toys = Toys(ram / "best", plan(choose="best"), CASES)
    toys.train()
    assert [r["loss"] for r in lines(toys.folder, "val")] == pytest.approx(values, rel=1e-6)
    (test,) = lines(toys.folder, "test")
    assert test["round"] == best + 1
    assert test["loss"] == pytest.approx(loss(models[best], "test"), rel=1e-6)
    assert {p.name for p in (toys.folder / "checkpoints").iterdir()} == {
        f"round-{r:04d}" for r in (best + 1, ROUNDS - 1, ROUNDS)
    }
    assert result(toys.folder)["w"].equal(models[best]["w"])
    assert lines(ram / "all", "test")[0]["round"] == ROUNDS
    assert result(ram / "all")["w"].equal(models[-1]["w"])


def test_a_run_without_gain_ends_and_its_last_model_or_its_best_is_the_result(ram: Path) -> None:
    values = [loss(model, "val") for model in every(ram / "all", plan())]
    best, patience = 0, 2
    for end, value in enumerate(values):
        best = end if value < values[best] else best
        if end - best >= patience:
            break
    assert end < ROUNDS - 1
    for choose, chosen in (("last", end + 1), ("best", best + 1)):
        toys = Toys(ram / choose, plan(choose=choose, patience=patience), CASES)
        with toys.opened() as run:
            run.train()
        assert run.progress.round == end + 1
        assert [r["round"] for r in lines(toys.folder, "val")] == list(range(1, end + 2))
        assert [r["round"] for r in lines(toys.folder, "test")] == [chosen]
        before = toys.ending()
        toys.train()  # it has ended: nothing is done again
        assert toys.ending() == before


@pytest.mark.parametrize("r", [1, 3, 5, 6])
@pytest.mark.parametrize("event", ["fold", "checkpoint", "evaluate"])
def test_an_interrupted_run_chooses_alike(r: int, event: str, ram: Path) -> None:
    made = plan(choose="best", ema=0.5)
    whole, again = Toys(ram / "whole", made, CASES), Toys(ram / "again", made, CASES)
    whole.train()

    def die(what: str, round: int) -> None:
        if (what, round) == (event, r):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        again.train(die)
    again.train()
    assert again.ending() == whole.ending()
    assert (again.folder / RESULT).read_bytes() == (whole.folder / RESULT).read_bytes()


def test_a_run_whose_end_is_repeated_has_its_lines_in_order(ram: Path) -> None:
    toys = Toys(ram, plan(choose="best"), CASES)
    toys.train()
    before = toys.ending()
    state = ram / "checkpoints" / f"round-{ROUNDS:04d}" / "state.json"
    state.write_bytes(b"damaged")
    toys.train()
    assert toys.ending() == before


def test_the_moving_average_is_its_closed_form_and_is_what_is_scored(ram: Path) -> None:
    beta = 0.7
    models = every(ram / "all", plan())
    smooth = every(ram / "ema", plan(ema=beta))
    assert pack({"m": models}) == pack({"m": smooth})  # it does not enter training
    # wₙ = (1-β) Σ β^(n-i) xᵢ, but for the first, whose weight is β^(n-1)
    shares = [beta ** (ROUNDS - 1), *((1 - beta) * beta ** (ROUNDS - 1 - i) for i in range(1, ROUNDS))]
    assert sum(shares) == pytest.approx(1)
    expected = sum(s * m["w"].double() for s, m in zip(shares, models, strict=True))
    got = result(ram / "ema")
    assert (got["w"] - expected).abs().max() < 1e-6
    assert lines(ram / "ema", "test")[0]["loss"] == pytest.approx(loss(got, "test"), rel=1e-6)
    last = load(ram / "ema" / "checkpoints" / f"round-{ROUNDS:04d}")
    assert last.result["w"].equal(got["w"])
    assert not last.model["w"].equal(got["w"])


def metrics(folder: Path, name: str, values: list[float]) -> Metrics:
    head = {"split": "val", "model": "federated", "site": "all", "patients": 1}
    made = Metrics(folder / "m.jsonl", plan())
    made.add({**head, "round": 2 * i + 2, name: value} for i, value in enumerate(values))
    return made


BEST: dict[str, tuple[str, list[float], tuple[int, int]]] = {
    "more is better": ("dice_mean", [0.1, 0.3, 0.2], (4, 1)),
    "less is better": ("loss", [0.3, 0.1, 0.2], (4, 1)),
    "by a word of its name": ("volume_error_abs_ml_1", [3.0, 1.0, 2.0], (4, 1)),
    "said by a minus": ("-strange", [3.0, 1.0, 2.0], (4, 1)),
    "the first of equals": ("auroc", [0.5, 0.5, 0.5], (2, 2)),
    "no number is no gain": ("auroc", [float("nan"), 0.5, float("nan")], (4, 1)),
    "nothing yet": ("auroc", [], (0, 0)),
}


@pytest.mark.parametrize("case", BEST)
def test_the_best_is_by_the_metrics_own_direction(case: str, tmp_path: Path) -> None:
    metric, values, found = BEST[case]
    assert metrics(tmp_path, metric.removeprefix("-"), values).best(metric) == found


def test_under_noise_an_evaluation_without_the_metric_is_no_gain(tmp_path: Path) -> None:
    local, privacy = {"batch_size": 2}, {"mode": "dpsgd", "sigma": 1.0, "nominal_patients": 4}
    noised = {**privacy, "metrics": "noised", "metrics_sigma": 1.0}
    federation = {"weight": "equal", "patience": 1, "metric": "loss"}
    made = toy_plan(local=local, privacy=noised, federation=federation)
    found = metrics(tmp_path, "loss", [0.2, 0.1])
    found.add([{"split": "val", "model": "federated", "site": "all", "patients": 1, "round": 6}])
    assert Metrics(tmp_path / "m.jsonl", made).best("loss") == (4, 1)
    assert not made.chooses_beside_privacy
    assert toy_plan(local=local, privacy=privacy, federation=federation).chooses_beside_privacy


def test_a_metric_that_cannot_be_is_refused_before_anything_is_written() -> None:
    check_metric(plan(choose="best", metric="-loss"))
    check_metric(plan(choose="last", metric="dice"))
    with pytest.raises(Stop, match=r"federation\.metric is '-dice'; validation has: loss") as stop:
        check_metric(plan(choose="best", metric="-dice"))
    assert stop.value.exit == Exit.CONFIG


def test_a_metric_that_validation_does_not_have_is_refused_with_those_it_has(ram: Path) -> None:
    with pytest.raises(Stop, match=r"federation\.metric is 'dice'; validation has: loss") as stop:
        Toys(ram, plan(choose="best", metric="dice"), CASES).train()
    assert stop.value.exit is Exit.CONFIG


WRONG = [
    {"choose": "best", "metric": ""},
    {"patience": 1, "metric": ""},
    {"patience": 1, "evaluate_every": 0},
]


@pytest.mark.parametrize("given", WRONG, ids=str)
def test_a_choice_by_nothing_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="need the name of a validation metric"):
        plan(**given)


@pytest.mark.parametrize("name", ["fedbn", "fedper", "ditto"])
def test_an_earlier_round_cannot_be_had_where_sites_keep_a_part(name: str) -> None:
    made = toy_plan(name, task="tiny_net", federation={"choose": "best", "metric": "loss"})
    with pytest.raises(Stop, match="leaves a part of the model at each site"):
        build_strategy(made).check(Study.of(made))


def test_where_no_site_tells_of_validation_nothing_is_chosen_by_it(ram: Path) -> None:
    cases = {site: {**splits, "val": []} for site, splits in CASES.items()}
    with pytest.raises(Stop, match="no site tells how the model does") as stop:
        Toys(ram, plan(choose="best"), cases).train()
    assert stop.value.exit is Exit.SITE_REFUSED


def test_a_best_model_that_is_gone_is_named(ram: Path) -> None:
    toys = Toys(ram, plan(choose="best"), CASES)

    def lose(event: str, r: int) -> None:
        if (event, r) == ("checkpoint", ROUNDS):
            for path in (ram / "checkpoints").glob("round-*/state.json"):
                if path.parent.name < f"round-{ROUNDS - 1:04d}":
                    path.unlink()

    with pytest.raises(Stop, match=r"^the best model, .*round-000\d, is gone") as stop:
        toys.train(lose)
    assert stop.value.exit is Exit.CHECKPOINT_DAMAGED


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    (tmp_path / RESULT).write_bytes(b"x")
    with pytest.raises(Stop, match="is damaged") as stop:
        result(tmp_path)
    assert stop.value.exit is Exit.CHECKPOINT_DAMAGED
