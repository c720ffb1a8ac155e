"""Who learns each patient's own scores: a simulation that asks for them, and nobody else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

from client.policy import Policy
from strategies.exact import Collect
from strategies.protocol import Refused, Spec, Update
from tasks.metrics import code as patient_code
from tasks.scoring.classes import KINDS
from tests.client.desk import Desk, code
from tests.toys import Toys, toy_cases, toy_plan


def plan(scores: str) -> Any:
    return toy_plan(task="scored", federation={"scores": scores})


def auroc(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, float] = next(
        line for line in lines if line["split"] == "test" and line["site"] == "all"
    )
    return found


def test_a_simulation_files_the_rows_and_its_ranks_are_exact(tmp_path: Path) -> None:
    cases = toy_cases(3, 4)
    Toys(tmp_path / "raw", plan("raw"), cases).train()
    path = tmp_path / "raw" / "scores" / "federated-test.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["wardround"])
        rows, site = file.get_tensor("rows"), file.get_tensor("site")
    assert about["columns"] == ["patient", "truth", "p_0", "p_1"]
    assert about["sites"] == ["site_0", "site_1", "site_2"]
    assert {(float(r[0]), int(s)) for r, s in zip(rows, site, strict=True)} == {
        (patient_code(case.patient), s) for s, splits in enumerate(cases.values()) for case in splits["test"]
    }
    exact = auroc(tmp_path / "raw")
    assert exact["auroc"] == pytest.approx(roc_auc_score(rows[:, 1], rows[:, 3]))
    assert exact["auroc_bound"] == 0
    Toys(tmp_path / "binned", plan("binned"), cases).train()
    assert not (tmp_path / "binned" / "scores").exists()
    binned = auroc(tmp_path / "binned")
    assert abs(binned["auroc"] - exact["auroc"]) <= binned["auroc_bound"] + 1e-12
    assert binned["ece"] == exact["ece"]


@pytest.mark.parametrize(("scores", "durable"), [("raw", False), ("raw", True), ("binned", False)])
def test_a_hospital_never_tells_rows(scores: str, durable: bool, ram: Path) -> None:
    desk = Desk(ram, plan(scores), durable=durable)
    reply = desk.ask(desk.asked("evaluate/federated/val"), kind="federated", split="val")
    assert isinstance(reply.body, Update)
    told = reply.body.tensors["statistics/sum"]
    size = KINDS["classes"].zero(2).to_vector().numel()
    assert len(told) == size + (8 if scores == "raw" and not durable else 0)  # two patients of four values


def test_a_hospital_whose_code_tells_rows_all_the_same_is_stopped(
    ram: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(ram, plan("raw"))
    monkeypatch.setattr("tasks.metrics.Statistics.alone", lambda self: self)
    assert code(desk.ask(desk.asked("evaluate/federated/val"), kind="federated", split="val")) == "shape"


def test_a_class_of_too_few_patients_is_refused(ram: Path) -> None:
    cases = toy_cases(1, 5)
    first = [float(case.images["image"][1][0]) for case in cases["site_0"]["train"]]
    cases["site_0"]["val"] = cases["site_0"]["train"]
    least = min(sum(t > 0 for t in first), sum(t <= 0 for t in first)) or 5
    for minimum, allowed in ((least, True), (least + 1, False)):
        desk = Desk(ram / str(minimum), plan("raw"), policy=Policy(minimum_cell=minimum), cases=cases)
        reply = desk.ask(desk.asked("evaluate/federated/val"), kind="federated", split="val")
        assert isinstance(reply.body, Update) if allowed else code(reply) == "policy"


def test_only_the_last_vector_has_a_tail_and_it_is_bounded(tmp_path: Path) -> None:
    spec = Spec({"a/x": ((2,), torch.float64), "b/y": ((3,), torch.float64)}, 1, 100.0, tail=4)

    def update(x: int, y: int) -> Update:
        numbers = torch.arange(20.0, dtype=torch.float64)
        return Update({"a/x": numbers[:x].clone(), "b/y": numbers[:y].clone()})

    for x, y in ((3, 3), (2, 2), (2, 8)):
        with pytest.raises(Refused, match="shape"):
            spec.check(update(x, y))
    with pytest.raises(Refused, match="shape"):
        replace(spec, tail=0).check(update(2, 5))
    collect = Collect()
    partial = collect.start(spec)
    for site, y in (("one", 3), ("two", 7)):
        spec.check(update(2, y))
        collect.add(partial, spec, site, (1, 0), update(2, y))
    with collect.finish(partial, spec) as collected:
        for site, y in (("one", 3), ("two", 7)):
            answer = collected.answer(site)
            assert answer["a/x"].tolist() == [0, 1]
            assert answer["b/y"].tolist() == list(range(y))
