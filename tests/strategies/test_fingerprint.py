"""The one-ask run: what it sums to, what a site refuses, and what it never answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from client.policy import Policy
from strategies.fingerprint import Fingerprinting
from strategies.protocol import Refused, Update
from tasks.data.fingerprint import CELLS, UNIT, Survey
from tests.client.desk import Desk, code
from tests.toys import Toys, toy_cases, toy_plan

ONCE: Any = {"federation": {"rounds": 1}}


def state(folder: Path, per_site: bool) -> dict[str, torch.Tensor]:
    plan = toy_plan("fingerprint", strategy={"per_site": per_site}, **ONCE)
    with Toys(folder, plan, toy_cases(3, 5)).opened() as run:
        before = dict(run.progress.model)
        progress = run.train()
    assert all(torch.equal(t, before[n]) for n, t in progress.model.items())
    assert not (folder / "metrics.jsonl").exists()
    found: dict[str, torch.Tensor] = progress.state
    return found


def test_ring_and_collection_and_pooled_data_agree_to_the_bit(ram: Path) -> None:
    each, summed = state(ram / "each", True), state(ram / "sum", False)
    pooled = Survey().of_site(
        ([case] for splits in toy_cases(3, 5).values() for case in splits["train"]), minimum=1
    )
    assert torch.equal(each["merged"], pooled.to_vector())
    assert torch.equal(summed["merged"], pooled.to_vector())
    assert sorted(each["sites"]) == ["site_0", "site_1", "site_2"]
    assert len(summed["sites"]) == 0


def test_a_site_suppresses_before_it_answers(ram: Path) -> None:
    cases = toy_cases(1, 7)
    desk = Desk(ram, toy_plan("fingerprint", **ONCE), policy=Policy(minimum_cell=4), cases=cases)
    body = desk.ask(desk.asked("fingerprint")).body
    assert isinstance(body, Update)
    assert body.weight == 1
    found = Survey().zero().from_vector(body.tensors["fingerprint/sum"])
    assert found.patients == 7
    for name in CELLS.keys() - {"intensity", "foreground"}:
        values = getattr(found, name)
        assert float(values[values > 0].amin()) >= 4 if values.any() else True
    assert found.foreground[:, 0].tolist() == [7 * UNIT] * 4
    again = desk.ask(desk.asked("fingerprint")).body
    assert isinstance(again, Update)
    assert torch.equal(again.tensors["fingerprint/sum"], body.tensors["fingerprint/sum"])


@pytest.mark.parametrize("policy", [Policy(minimum_cell=8), Policy(statistics="none", minimum_cell=1)])
def test_a_site_keeps_its_fingerprint_where_its_rules_say_so(ram: Path, policy: Policy) -> None:
    desk = Desk(ram, toy_plan("fingerprint", **ONCE), policy=policy, cases=toy_cases(1, 7))
    assert code(desk.ask(desk.asked("fingerprint"))) == "policy"


@pytest.mark.parametrize("stage", ["train", "evaluate/federated/test", "trivial/constant"])
def test_it_answers_nothing_else(ram: Path, stage: str) -> None:
    desk = Desk(ram, toy_plan("fingerprint", **ONCE))
    assert code(desk.ask(desk.asked(stage))) == "stage"
    with pytest.raises(Refused, match="stage"):
        Fingerprinting().spec(desk.study, stage)
