"""The loop against sites that misbehave: quarantine, quorum, deadline, attempts."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.exits import Exit, Stop
from server.cohort import cohort
from server.exchange import Handler
from server.exchange.local import LocalExchange
from server.rounds import Run
from strategies import build_strategy
from strategies.base import Study
from strategies.exact import MAX_ADDS
from strategies.protocol import Failure, Instruction, Reply, Tree, Update
from tests.toys import Toys, toy_cases, toy_plan


@dataclass(frozen=True)
class Forger:
    """A site whose training replies are changed on their way."""

    site: Handler
    forge: Callable[[Reply], Any]

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        reply = self.site.handle(instruction, common)
        made: Reply = self.forge(reply) if instruction.stage == "train" else reply
        return made


def body(reply: Reply) -> Update:
    if not isinstance(reply.body, Update):
        raise TypeError(reply.body)
    return reply.body


def with_tensor(reply: Reply, name: str, tensor: torch.Tensor) -> Reply:
    return replace(reply, body=replace(body(reply), tensors={**body(reply).tensors, name: tensor}))


def with_weight(reply: Reply, weight: Any) -> Reply:
    return replace(reply, body=replace(body(reply), weight=weight))


FORGERIES: dict[str, tuple[Callable[[Reply], Any], str]] = {
    "nan": (lambda r: with_tensor(r, "delta/w", torch.full((3,), torch.nan)), "finite"),
    "inf": (lambda r: with_tensor(r, "delta/w", torch.full((3,), torch.inf)), "finite"),
    "huge": (lambda r: with_tensor(r, "delta/w", torch.full((3,), 65.0)), "range"),
    "shape": (lambda r: with_tensor(r, "delta/w", torch.zeros(1)), "shape"),
    "type": (lambda r: with_tensor(r, "delta/w", torch.zeros(3, dtype=torch.float64)), "shape"),
    "extra": (lambda r: with_tensor(r, "delta/x", torch.zeros(3)), "names"),
    "missing": (lambda r: replace(r, body=replace(body(r), tensors={})), "names"),
    "weight true": (lambda r: with_weight(r, True), "weight"),
    "weight negative": (lambda r: with_weight(r, -900), "weight"),
    "weight 1e9": (lambda r: with_weight(r, 10**9), "weight"),
    "weight float": (lambda r: with_weight(r, 2.0), "weight"),
    "other site": (lambda r: replace(r, site="site_0"), "addressee"),
    "ring": (lambda r: replace(r, body=replace(body(r), form="ring")), "form"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("strategy", ["fedavg", "median"])
def test_a_bad_reply_is_quarantined_and_the_others_count(forgery: str, strategy: str, ram: Path) -> None:
    forge, code = FORGERIES[forgery]
    cases, plan = toy_cases(), toy_plan(strategy, federation={"rounds": 2})
    hostile = Toys(
        ram / "a", plan, cases, wrap=lambda site, name: Forger(site, forge) if name == "site_1" else site
    ).train()
    # oracle: a federation in which that site fails by itself
    failing = Toys(
        ram / "b",
        plan,
        cases,
        wrap=lambda site, name: (
            Forger(site, lambda r: Reply(r.site, Failure("memory"))) if name == "site_1" else site
        ),
    ).train()
    assert torch.equal(hostile["w"], failing["w"])
    journal = [json.loads(line) for line in (ram / "a" / "journal.jsonl").read_text().splitlines()]
    assert Counter(entry["code"] for entry in journal if "code" in entry) == {code: 2}


def test_too_few_valid_replies_end_the_run_with_a_number(ram: Path) -> None:
    made = Toys(
        ram,
        toy_plan(federation={"min_replies": 3}),
        toy_cases(),
        wrap=lambda site, name: Forger(site, FORGERIES["nan"][0]) if name == "site_1" else site,
    )
    with pytest.raises(
        Stop, match=r"round 1 of 3 was abandoned 3 times: 2 valid replies, need 3: finite: site_1"
    ) as stop:
        made.train()
    assert stop.value.exit == Exit.TOO_FEW_REPLIES


def test_a_run_that_was_given_up_goes_on_when_its_sites_are_well(ram: Path) -> None:
    cases, plan = toy_cases(), toy_plan(federation={"min_replies": 3})
    well = ram / "well"

    @dataclass(frozen=True)
    class Ill:
        site: Handler

        def handle(self, instruction: Instruction, common: Tree) -> Reply:
            if instruction.round == 2 and not well.exists():
                return Reply(instruction.site, Failure("memory"))
            return self.site.handle(instruction, common)

    made = Toys(ram / "a", plan, cases, wrap=lambda site, name: Ill(site) if name == "site_1" else site)
    with pytest.raises(Stop, match="round 2 of 3 was abandoned 3 times"):
        made.train()
    well.touch()
    assert torch.equal(made.train()["w"], Toys(ram / "b", plan, cases).train()["w"])


def test_an_abandoned_attempt_leaves_no_trace_in_the_result(ram: Path) -> None:
    """The first attempt fails at one site; the second is the undisturbed round, draws and all."""
    cases, plan = toy_cases(), toy_plan("scaffold", federation={"min_replies": 3})
    calls: Counter[str] = Counter()

    @dataclass(frozen=True)
    class Once:
        site: Handler

        def handle(self, instruction: Instruction, common: Tree) -> Reply:
            if instruction.stage == "train" and instruction.round == 2:
                calls[f"attempt {instruction.attempt}"] += 1
                if instruction.attempt == 0:
                    return Reply(instruction.site, Failure("memory"))
            return self.site.handle(instruction, common)

    stumbling = Toys(ram / "a", plan, cases, wrap=lambda site, name: Once(site) if name == "site_2" else site)
    smooth = Toys(ram / "b", plan, cases)
    assert torch.equal(stumbling.train()["w"], smooth.train()["w"])
    assert calls == {"attempt 0": 1, "attempt 1": 1}


def test_past_the_deadline_the_rest_are_failures(ram: Path) -> None:
    @dataclass(frozen=True)
    class Slow:
        site: Handler

        def handle(self, instruction: Instruction, common: Tree) -> Reply:
            if instruction.stage == "train":
                time.sleep(0.3)
            return self.site.handle(instruction, common)

    plan = toy_plan(federation={"rounds": 1, "round_timeout_s": 0.2, "min_replies": 1})
    Toys(ram, plan, toy_cases(), wrap=lambda site, name: Slow(site)).train()
    journal = [json.loads(line) for line in (ram / "journal.jsonl").read_text().splitlines()]
    late = [
        entry["site"] for entry in journal if entry.get("code") == "deadline" and entry["stage"] == "train"
    ]
    assert late == ["site_1", "site_2"]  # checked between sites: the first has its answer in


def test_what_a_killed_process_left_half_written_goes_with_the_next_checkpoint(ram: Path) -> None:
    left = ram / "checkpoints" / ".round-0002.99.part"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    Toys(ram, toy_plan(), toy_cases()).train()
    assert {path.name for path in left.parent.iterdir()} == {"round-0002", "round-0003"}


def test_an_endless_score_is_refused(ram: Path) -> None:
    """Two of them would add up to infinity patients, which no one can round."""

    def boasting(site: Handler, name: str) -> Handler:
        return Boasting(site) if name != "site_0" else site

    made = replace(Toys(ram, toy_plan(), toy_cases()), wrap=boasting)
    made.train()
    lines = [json.loads(line) for line in (ram / "metrics.jsonl").read_text().splitlines()]
    assert {line["site"] for line in lines} == {"all", "site_0"}


@dataclass
class Boasting:
    """Its scores are beyond measure."""

    site: Handler

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        reply = self.site.handle(instruction, common)
        if instruction.stage.startswith("evaluate") and isinstance(reply.body, Update):
            return replace(reply, body=Update({n: t + 1.7e308 for n, t in reply.body.tensors.items()}))
        return reply


def test_no_site_accepts_the_plan(ram: Path) -> None:
    made = Toys(ram, toy_plan(), toy_cases(), wrap=lambda site, name: replace(site, code="another"))  # type: ignore[type-var]
    with pytest.raises(Stop, match="0 sites accept the plan; need 1: code: site_0, site_1, site_2") as stop:
        made.train()
    assert stop.value.exit == Exit.SITE_REFUSED


def test_more_sites_than_a_sum_has_room_for_are_refused_at_the_start(ram: Path) -> None:
    plan = toy_plan()
    study, names = Study.of(plan), [f"s{i}" for i in range(MAX_ADDS + 1)]
    with pytest.raises(Stop, match="4097 sites would be asked in a round; a sum has room for 4096: set"):
        Run(
            study, build_strategy(plan), names, LocalExchange(never, blobs=ram, seed=0), ram / "run", "r", "c"
        )
    assert not (ram / "run").exists()


def never(name: str) -> Handler:
    raise NotImplementedError(name)


def test_cohorts_come_from_the_seed(ram: Path) -> None:
    names = [f"s{i}" for i in range(10)]
    plan = toy_plan(federation={"cohort": 4})
    drawn = [cohort(plan, r, names) for r in range(1, 200)]
    assert drawn == [cohort(plan, r, names[::-1]) for r in range(1, 200)]
    assert all(len(set(c)) == 4 and list(c) == sorted(c) for c in drawn)
    counts = Counter(name for c in drawn for name in c)
    assert min(counts.values()) > 0.75 * 199 * 0.4
    assert cohort(toy_plan(), 1, names) == tuple(names)


def test_metrics_hold_no_time_and_one_line_a_site(ram: Path) -> None:
    made = Toys(ram, toy_plan("ditto", federation={"rounds": 4, "evaluate_every": 2}), toy_cases())
    made.train()
    lines = [json.loads(line) for line in (ram / "metrics.jsonl").read_text().splitlines()]
    seen = {(line["round"], line["split"], line["model"], line["site"]) for line in lines}
    assert len(seen) == len(lines)
    sites = {"site_0", "site_1", "site_2"}
    expected = {(r, "val", m, s) for r in (2, 4) for m in ("federated",) for s in {*sites, "all"}}
    expected |= {(4, "test", "federated", s) for s in {*sites, "all"}}
    for r, split in ((2, "val"), (4, "val"), (4, "test")):
        expected |= {(r, split, f"personal:{s}", s) for s in sites} | {(r, split, "personal", "all")}
    assert seen == expected
    assert all(set(line) == {"round", "split", "model", "site", "patients", "loss"} for line in lines)
    by_site = {
        line["site"]: line for line in lines if line["split"] == "test" and line["model"] == "federated"
    }
    # oracle: sums travel, so the whole is the mean over all patients
    total = sum(by_site[s]["loss"] * by_site[s]["patients"] for s in sites)
    assert by_site["all"]["loss"] == pytest.approx(total / by_site["all"]["patients"], rel=1e-12)


def test_trivial_predictor_from_sites_equals_the_pooled_one(ram: Path) -> None:
    cases = toy_cases()
    with Toys(ram, toy_plan(federation={"rounds": 1}), cases).opened() as run:
        run.train()
        lines = run.trivial("constant", ("test",))
    train = torch.stack([c.images["image"][1] for s in cases.values() for c in s["train"]])
    mean = train.double().mean(0)
    losses = [
        0.5 * (c.images["image"][0] * (mean - c.images["image"][1]) ** 2).sum()
        for s in cases.values()
        for c in s["test"]
    ]
    assert lines[-1]["site"] == "all"
    assert lines[-1]["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-6)
