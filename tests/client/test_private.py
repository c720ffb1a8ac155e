"""The local loop under DP, and the gate: what is charged and noised, what comes after, what stays home."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client.budget import Budget
from client.ledger import Ledger
from client.policy import Policy
from client.private import draws
from client.train import Archive, Bench, Charge, Session
from conf.schema import Plan
from server.privacy import calibrated, central_statement, charges, statement
from strategies import build_strategy
from strategies.base import Correct, Study, fresh_model
from strategies.privacy import noise
from strategies.privacy.accountant import Entry, merged, prv
from strategies.privacy.dpsgd import Mechanism
from strategies.privacy.metrics import planned
from strategies.protocol import Failure, Instruction, Refused, Reply, Update
from tasks.base import Case, Phase, Task
from tests.toys import Quadratic, Toys, toy_archive, toy_case, toy_cases, toy_plan

PATIENTS = 4
NONE = toy_plan().model


def private(task: str = "quadratic", strategy: str = "fedavg", /, **sections: Any) -> Plan:
    """A plan in which every patient takes part in every step, unless said otherwise."""
    return toy_plan(
        strategy,
        task=task,
        toy={"norm": False} if task == "tiny_net" else {},
        federation={"weight": "equal", **sections.get("federation", {})},
        local={"batch_size": PATIENTS, "steps": 1, "lr": 1.0, **sections.get("local", {})},
        privacy={
            "mode": "dpsgd",
            "nominal_patients": PATIENTS,
            "sigma": 1.0,
            **sections.get("privacy", {}),
        },
    )


def cases(patients: int = PATIENTS) -> list[Case]:
    return [
        replace(toy_case(f"p{i}", torch.full((3,), 1.0), torch.full((3,), float(i + 1))), patient=f"p{i}")
        for i in range(patients)
    ]


def session(
    plan: Plan, charge: Charge | None = lambda *_: None, *, task: Task | None = None, patients: int = PATIENTS
) -> Session:
    study = Study.of(plan)
    study = study if task is None else replace(study, task=task)
    asked = Instruction("run", 1, 0, "train", "site_0", None, plan.digest, "code", "")
    archive = toy_archive({"train": cases(patients)})
    return Session(Bench("cpu"), study, archive, Policy(minimum_cell=1), asked, {}, {}, charge)


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of 1 everywhere."""
    monkeypatch.setattr(noise, "normal", lambda count: torch.ones(count, dtype=torch.float64))


# ---- a step


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("correct", [None, lambda ps: [p.grad.add_(100.0) for p in ps.values()]])
def test_a_step_is_the_clipped_mean_then_the_noise_then_what_the_algorithm_adds(
    correct: Correct | None,
) -> None:
    # at w = 0 the gradient of patient i is -(i + 1) in each of three coordinates: its norm is √3 (i + 1)
    clip = 2.0
    got = session(private(privacy={"clip": clip, "sigma": 0.5})).fit({"w": torch.zeros(3)}, correct=correct)
    clipped = sum(-min(i + 1, clip / 3**0.5) for i in range(PATIENTS))
    expected = -((clipped + 0.5 * clip) / PATIENTS + (100.0 if correct else 0.0))
    assert got["w"].tolist() == pytest.approx([expected] * 3, rel=1e-6)


def test_a_following_clip_starts_anew_each_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "normal", lambda count: torch.zeros(count, dtype=torch.float64))
    adapt = {"quantile": 0.25, "rate": 1.0, "count_noise": 2.0}
    here = session(private(local={"steps": 2, "lr": 1e-9}, privacy={"clip": 2.0, "adapt": adapt}))
    total, clip = 0.0, 2.0
    for _ in range(2):  # at w = 0 the norms are √3 (i + 1)
        norms = [3**0.5 * (i + 1) for i in range(PATIENTS)]
        total += sum(min(n, clip) for n in norms) / 3**0.5 / PATIENTS
        clip *= math.exp(-(sum(n <= clip for n in norms) / PATIENTS - 0.25))
    for _ in range(2):
        assert here.fit({"w": torch.zeros(3)})["w"].tolist() == pytest.approx([1e-9 * total] * 3, rel=1e-5)


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("patients", [1, PATIENTS, 9])
def test_the_divisor_is_the_plans_whoever_is_there(patients: int) -> None:
    got = session(private(privacy={"clip": 1e-3}), patients=patients).fit({"w": torch.zeros(3)})["w"]
    expected = (patients / 3**0.5 - 1) * 1e-3 / PATIENTS
    assert got.tolist() == pytest.approx([expected] * 3, rel=1e-5)


def test_a_step_of_nobody_moves_the_model_by_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "chosen", lambda count, rate: torch.zeros(count, dtype=torch.bool))
    assert session(private()).fit({"w": torch.zeros(3)})["w"].all()


def test_no_seed_repeats_a_private_run() -> None:
    found = [session(private()).fit({"w": torch.zeros(3)})["w"].clone() for _ in range(2)]
    assert not found[0].equal(found[1])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_network_learns(optimizer: str) -> None:
    plan = private("tiny_net", local={"steps": 30, "lr": 0.1, "optimizer": optimizer}, privacy={"sigma": 0.1})
    study = Study.of(plan)
    trained = session(plan).fit(study.initial)
    images = torch.stack([case.images["image"] for case in cases()])

    def error(weights: Mapping[str, Tensor]) -> float:
        model = fresh_model(plan, study.task)
        model.load_state_dict(dict(weights))
        with torch.no_grad():
            return float(model(images[:, 0], images[:, 1]).mean())

    assert error(trained) < 0.8 * error(study.initial)


# ---- who takes part, with what


def test_a_patient_less_changes_nothing_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws in turn from one generator would move every later patient's patch."""
    monkeypatch.setattr(noise, "chosen", lambda count, rate: torch.ones(count, dtype=torch.bool))

    class Noisy(Quadratic):
        def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> dict[str, Tensor]:
            made = super().batch(examples, draw)
            return {name: t + torch.randn(t.shape, generator=draw) for name, t in made.items()}

    plan = private(privacy={"examples": 3})

    def steps(left: Sequence[Case]) -> list[list[Mapping[str, Tensor]]]:
        archive = toy_archive({"train": left})
        task = Noisy(NONE, NONE)
        prepared = draws(
            plan,
            task,
            archive.patients("train"),
            lambda entry: task.prepare(archive.load(entry)),
            site="s",
            round=1,
            purpose="train",
        )
        return [next(prepared) for _ in range(3)]

    whole, less = steps(cases()), steps(cases()[1:])
    for with_all, without in zip(whole, less, strict=True):
        assert all(len(batch["a"]) == 3 for batch in with_all)
        for a, b in zip(with_all[1:], without, strict=True):
            assert all(a[name].equal(b[name]) for name in a)
    assert not whole[0][1]["a"].equal(whole[1][1]["a"])  # yet each step has its own


# ---- the ledger


def test_every_private_step_is_charged_before_the_first() -> None:
    class Watched(Quadratic):
        @property
        def phases(self) -> tuple[Phase, ...]:
            (one,) = super().phases
            free = Phase("free", lambda model, batch: model.w.sum()[None], private=False)  # type: ignore[operator]
            return one, Phase("rare", one.loss, every=3), free

        def batch(self, examples: Sequence[Mapping[str, Tensor]], draw: torch.Generator) -> dict[str, Tensor]:
            said.append("read")
            return dict(super().batch(examples, draw))

    said: list[Any] = []
    plan = private(local={"steps": 7})
    session(plan, lambda *entry: said.append(entry), task=Watched(NONE, NONE)).fit({"w": torch.zeros(3)})
    assert said[0] == (Entry(1.0, 1.0, 7 + 3), "training")
    assert said.count("read") == (7 + 3) * PATIENTS


def test_without_a_ledger_nothing_is_trained() -> None:
    with pytest.raises(Refused, match="policy: no privacy ledger"):
        session(private(), None).fit({"w": torch.zeros(3)})


def test_a_training_loss_stays_home() -> None:
    with pytest.raises(Refused, match="policy: a training loss is a release"):
        session(private()).loss({"w": torch.zeros(3)})


# ---- the gate


def asked(toys: Toys, stage: str = "train") -> Instruction:
    from strategies.code import code_digest

    return Instruction("run", 1, 0, stage, "site_0", None, toys.plan.digest, code_digest(), "")


def federation(folder: Path, plan: Plan, **options: Any) -> Toys:
    return Toys(folder, plan, toy_cases(2), **options)


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize(("strategy", "fits"), [("fedavg", 1), ("scaffold", 1), ("ditto", 2), ("fedbn", 1)])
def test_a_run_charges_each_site_what_the_plan_says(
    strategy: str, fits: int, durable: bool, ram: Path
) -> None:
    plan = private("tiny_net", strategy, local={"steps": 2, "batch_size": 2, "lr": 0.1})
    federation(ram, plan, durable=durable).train()
    mechanism = Mechanism.of(plan)
    assert (mechanism.sigma, mechanism.rate) == (1.0, 0.5)
    for site in ("site_0", "site_1"):
        ledger = Ledger(ram / "sites" / site / "ledger.jsonl", None)
        assert ledger.entries() == [Entry(1.0, 0.5, 2 * 3 * fits)]
        assert ledger.lines()[1] == set()  # all settled


def test_the_same_question_is_answered_and_charged_once(ram: Path) -> None:
    toys = federation(ram, private(), durable=True)
    site = toys.site("site_0")
    plan = {"plan": toys.plan.canonical()}
    assert isinstance(site.handle(replace(asked(toys, "plan"), round=0), plan).body, Update)
    common = {"model": {"w": torch.zeros(3)}}
    first, second = (site.handle(asked(toys), common).body for _ in range(2))
    assert isinstance(first, Update)
    assert isinstance(second, Update)
    assert first.tensors["delta/w"].equal(second.tensors["delta/w"])
    assert [e.steps for e in site.charged("run")] == [1]
    assert site.charged("other") == []


def body(toys: Toys, stage: str, common: Any, **changes: Any) -> Reply:
    site = replace(toys.site("site_0"), **changes)
    toys.site("site_0").plans.accept(toys.plan, {})
    return site.handle(asked(toys, stage), common)


def test_without_a_ledger_the_plan_is_refused(ram: Path) -> None:
    toys = federation(ram, private())
    answer = body(toys, "plan", {"plan": toys.plan.canonical()}, ledger=None)
    assert isinstance(answer.body, Failure)
    assert answer.body.code == "policy"


def test_a_plan_that_dp_cannot_train_is_refused(ram: Path) -> None:
    plan = private("tiny_net").model_copy(update={"task": toy_plan(task="tiny_net").task})  # with BatchNorm
    toys = federation(ram, plan)
    answer = body(toys, "plan", {"plan": plan.canonical()})
    assert isinstance(answer.body, Failure)
    assert answer.body.code == "plan"
    assert "use privacy.swap_norms=true, or" in (ram / "sites" / "site_0" / "incidents.jsonl").read_text()


@pytest.mark.parametrize("mode", ["dpsgd", "central"])
def test_batch_norms_are_swapped_where_asked_and_the_record_says_where(mode: str, ram: Path) -> None:
    rules = {"weight": "equal", "rounds": 1}
    given = {"nominal_patients": 4} if mode == "dpsgd" else {}
    private = {"mode": mode, "sigma": 1.0, "swap_norms": True, **given}
    plan = toy_plan(task="tiny_net", federation=rules, privacy=private)
    model = federation(ram, plan).train()
    assert not any("running" in name for name in model)
    said = central_statement(plan, 2) if mode == "central" else statement(plan, {})
    assert said["swapped_norms"] == ["layers.1"]


@pytest.mark.parametrize(("durable", "told"), [(True, False), (False, True)])
def test_metrics_of_a_private_run_stay_home_but_in_simulation(durable: bool, told: bool, ram: Path) -> None:
    toys = federation(ram, private(), durable=durable)
    down = {"kind": "federated", "model": {"w": torch.zeros(3)}, "split": "val"}
    assert isinstance(body(toys, "evaluate/federated/val", down).body, Update) == told
    assert isinstance(body(toys, "trivial/constant", {}).body, Update) == told


NOISED = {"metrics": "noised", "metrics_sigma": 3.0}


@pytest.mark.parametrize("durable", [True, False])
def test_noised_metrics_leave_and_are_charged(durable: bool, ram: Path) -> None:
    plan = private(privacy=NOISED, federation={"rounds": 4, "evaluate_every": 2})
    toys = federation(ram, plan, durable=durable)
    toys.train()
    lines = [json.loads(line) for line in (ram / "metrics.jsonl").read_text().splitlines()]
    assert [(x["round"], x["split"]) for x in lines if x["site"] == "all"] == [
        (2, "val"),
        (4, "val"),
        (4, "test"),
    ]
    held = Ledger(ram / "sites" / "site_0" / "ledger.jsonl", None)
    assert held.entries(purpose="metrics") == [Entry(3.0, 1.0, planned(plan, build_strategy(plan)))]
    assert charges(plan, ram / "journal.jsonl")["site_0"].count(Entry(3.0, 1.0, 1)) == 3
    assert sorted(merged(charges(plan, ram / "journal.jsonl")["site_0"])) == sorted(held.entries())


@pytest.mark.parametrize("anchor", ["", "ab", 7, ["0" * 64]])
def test_an_anchor_is_a_head_or_refused(anchor: object, ram: Path) -> None:
    toys = federation(ram, private())
    asking = replace(asked(toys, "plan"), own={"anchor": anchor})
    answer = toys.site("site_0").handle(asking, {"plan": toys.plan.canonical()}).body
    assert isinstance(answer, Failure)
    assert answer.code == "payload"


def test_scores_are_reserved_before_a_patient_is_read(ram: Path) -> None:
    toys = federation(ram, private(privacy=NOISED), durable=True)
    down = {"kind": "federated", "model": {"w": torch.zeros(3)}, "split": "val"}
    spent = Ledger(
        ram / "sites" / "site_0" / "ledger.jsonl", {"patients": Budget(purposes={"metrics": 1e-9})}
    )
    refused = body(toys, "evaluate/federated/val", down, ledger=spent)
    assert isinstance(refused.body, Failure)
    assert refused.body.code == "budget"
    kinds = {
        "policy": body(toys, "evaluate/federated/val", down, policy=Policy(statistics="none")),
        "other": body(toys, "evaluate/given/val", {**down, "kind": "given"}),
        "sums": body(toys, "trivial/constant", {}),
    }
    assert {reply.body.code for reply in kinds.values() if isinstance(reply.body, Failure)} == {
        "policy",
        "stage",
    }
    assert sum(isinstance(reply.body, Failure) for reply in kinds.values()) == 3
    # nobody is too few: noise hides how many there are
    first, again = (body(toys, "evaluate/federated/val", down, policy=Policy()) for _ in range(2))
    assert isinstance(first.body, Update)
    assert isinstance(again.body, Update)
    assert first.body.tensors["statistics/sum"].equal(again.body.tensors["statistics/sum"])
    assert [e.steps for e in toys.site("site_0").charged("run")] == [1]


def test_a_private_run_does_not_tell_that_a_site_has_nobody(ram: Path) -> None:
    cases = {name: {**splits, "train": []} for name, splits in toy_cases().items()}
    toys = Toys(ram, private(), cases, durable=True)
    assert isinstance(body(toys, "plan", {"plan": toys.plan.canonical()}).body, Update)
    reply = body(toys, "train", {"model": {"w": torch.zeros(3)}})
    assert isinstance(reply.body, Update)
    assert float(reply.body.tensors["delta/w"].abs().min()) > 0  # noise alone


def test_evaluations_count_in_the_price(ram: Path) -> None:
    wanted = {"sigma": 0.0, "epsilon": 4.0, "clip": 1.0}
    federated = {"rounds": 5, "evaluate_every": 1}
    plain = calibrated(private(privacy=wanted, federation=federated))
    scored = calibrated(private(privacy={**wanted, **NOISED}, federation=federated))
    assert scored.privacy.sigma > plain.privacy.sigma
    whole = [Entry(scored.privacy.sigma, 1.0, 5), Entry(3.0, 1.0, 6)]
    assert 3.9 < prv(whole, scored.privacy.delta) <= 4.0


def test_a_hospital_may_refuse_what_is_not_private(ram: Path) -> None:
    strict = Policy(minimum_cell=1, privacy="required")
    for plan, accepted in ((toy_plan(), False), (private(), True)):
        toys = federation(ram, plan)
        answer = body(toys, "plan", {"plan": plan.canonical()}, policy=strict)
        assert isinstance(answer.body, Update) == accepted


def test_only_parameters_travel() -> None:
    plan = private("tiny_net").model_copy(update={"task": toy_plan(task="tiny_net").task})
    study, strategy = Bench("cpu").study(plan)
    sent = strategy.spec(study, "train").tensors
    assert {name.partition("/")[2] for name in sent} == study.trainable
    assert study.initial.keys() - study.trainable  # BatchNorm's statistics


def test_an_archive_without_patients_is_left_to_the_training(ram: Path) -> None:
    bench, plan = Bench("cpu"), private()
    bench.vet(plan, Archive({}, lambda _: cases()[0]))
    archive, text = Archive({}, lambda _: cases()[0]), asked(federation(ram, plan))
    here = Session(bench, Study.of(plan), archive, Policy(), text, {}, {}, lambda *_: None)
    assert bool(here.fit({"w": torch.zeros(3)})["w"].all())  # noise alone
