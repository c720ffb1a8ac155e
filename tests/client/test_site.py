"""The gate: what is refused and with which code, and what is answered twice the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from client.audit import Audit
from client.chain import Head
from client.policy import Policy
from conf.exits import Exit, Stop
from conf.schema import Section
from strategies import STRATEGIES
from strategies.protocol import Failure, Refused, Tree, Update
from tests.client.desk import Desk, blob, code
from tests.toys import Quadratic, toy_cases, toy_plan


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every batch that is made: what training costs."""
    made: list[int] = []
    true = Quadratic.batch

    def batch(self: Quadratic, examples: Any, draw: torch.Generator) -> Any:
        made.append(len(examples))
        return true(self, examples, draw)

    monkeypatch.setattr(Quadratic, "batch", batch)
    return made


# ---- the same instruction, the same bytes

#: an exchange of sums draws nothing by chance: of every round it is the same
TRAINING = [name for name in STRATEGIES if name != "sums"]


@pytest.mark.parametrize("name", TRAINING)
def test_a_repeated_instruction_gets_the_same_bytes_and_trains_nothing(
    name: str, ram: Path, steps: list[int]
) -> None:
    desk = Desk(ram, toy_plan(name))
    stage = "train/0" if name == "cyclic" else "train"
    first = blob(desk.ask(desk.asked(stage)))
    assert len(steps) == {"ditto": 8, "flower_qfedavg": 6}.get(name, 4)
    steps.clear()
    assert blob(desk.ask(desk.asked(stage))) == first
    desk.restart()
    assert blob(desk.ask(desk.asked(stage))) == first
    # round 2 says that round 1 counted; both can be asked again, by a coordinator that fell back by one
    later = desk.asked(stage, round=2, settled=(1, 0))
    second = blob(desk.ask(later))
    steps.clear()
    desk.restart()
    assert blob(desk.ask(later)) == second
    assert blob(desk.ask(desk.asked(stage))) == first
    assert blob(desk.ask(later)) == second
    assert steps == []
    assert first != second
    assert desk.incidents() == []


@pytest.mark.parametrize("name", TRAINING)
def test_a_reply_does_not_change_when_its_model_goes_on_to_train(name: str, ram: Path) -> None:
    desk = Desk(ram, toy_plan(name), durable=False)
    stage = "train/0" if name == "cyclic" else "train"
    reply = desk.ask(desk.asked(stage))
    first = blob(reply)
    assert blob(desk.ask(desk.asked(stage, round=2, settled=(1, 0)))) != first
    assert blob(reply) == first


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_another_instruction_under_the_same_key_is_refused(name: str, ram: Path, steps: list[int]) -> None:
    desk = Desk(ram, toy_plan(name))
    first = blob(desk.ask())
    steps.clear()
    for change in ({"own": {"x": 1}}, {"common": "0" * 64}, {"settled": (0, 0)}):
        assert code(desk.ask(desk.asked(**change))) == "conflict"
        desk.restart()
        assert code(desk.ask(desk.asked(**change))) == "conflict"
    assert steps == []
    assert blob(desk.ask()) == first
    # another run, round, attempt or stage is another key
    keys: list[dict[str, Any]] = [{"run": "other"}, {"attempt": 1}, {"stage": "train/1"}]
    for change in keys:
        blob(desk.ask(desk.asked(**change)))
    assert len(steps) == 4 * len(keys)


def test_an_evaluation_is_answered_from_memory_too(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(ram, toy_plan())
    asked = desk.asked("evaluate/federated/val")
    first = blob(desk.ask(asked, kind="federated", split="val"))
    monkeypatch.setattr(Quadratic, "score", None)
    desk.restart()
    assert blob(desk.ask(asked, kind="federated", split="val")) == first


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_a_simulated_site_keeps_no_reply(name: str, ram: Path, steps: list[int]) -> None:
    desk = Desk(ram, toy_plan(name), durable=False)
    first = blob(desk.ask())
    assert len(steps) == 4
    assert blob(desk.ask()) == first  # trained again, from the same state
    assert len(steps) == 8
    assert len(desk.files()) == (name == "scaffold")


def test_replies_older_than_the_settled_round_are_dropped(ram: Path) -> None:
    desk = Desk(ram, toy_plan(federation={"rounds": 5}))
    for r in range(1, 6):
        blob(desk.ask(desk.asked(round=r, settled=(r - 1, 0) if r > 1 else None)))
    assert sorted(name[:12] for name in desk.files()) == ["floor", "reply-000004", "reply-000005"]


def test_what_was_answered_and_forgotten_is_not_answered_anew(ram: Path, steps: list[int]) -> None:
    """Exact scores of one model after another, under the same name, would tell of each patient."""
    desk = Desk(ram, toy_plan(federation={"rounds": 5}))
    for r in range(1, 5):
        blob(desk.ask(desk.asked(round=r, settled=(r - 1, 0) if r > 1 else None)))
    steps.clear()
    desk.restart()
    for stage in ("train", "trivial/constant", "evaluate/federated/val"):
        for r in (1, 2):
            asked = desk.asked(stage, round=r)
            assert code(desk.ask(asked, kind="federated", split="val")) == "stale"
    assert steps == []
    blob(desk.ask(desk.asked(round=5, settled=(4, 0))))


@pytest.mark.parametrize(
    ("stage", "changes", "down", "wanted"),
    [
        ("train", {"round": 4}, {}, "stage"),
        ("train", {"attempt": 3}, {}, "stage"),
        ("trivial/constant/1", {}, {}, "stage"),
        ("trivial/constant/00", {}, {}, "stage"),
        ("evaluate/federated/val/again", {}, {"split": "val/again"}, "stage"),
        ("evaluate/federated/train", {}, {"split": "train"}, "stage"),
        ("evaluate/federated/val", {}, {"split": "train"}, "payload"),
        ("evaluate/federated/val", {}, {"kind": "given"}, "payload"),
        ("evaluate/federated/val", {}, {"kind": "trivial", "name": "constant"}, "payload"),
        ("evaluate/given/val", {}, {"kind": "given"}, "stage"),
        ("evaluate/personal/val", {}, {"kind": "personal"}, "stage"),
        ("fingerprint", {}, {}, "stage"),
        ("train", {}, {}, ""),
        ("train", {"round": 3, "attempt": 2}, {}, ""),
        ("trivial/constant/0", {}, {}, ""),
        ("evaluate/federated/test", {}, {"split": "test"}, ""),
    ],
)
def test_a_hospital_answers_what_the_plan_promised_and_nothing_beside(
    stage: str, changes: dict[str, int], down: Tree, wanted: str, ram: Path
) -> None:
    desk = Desk(ram, toy_plan())
    reply = desk.ask(desk.asked(stage, **changes), **{"kind": "federated", "split": "val", **down})
    assert (reply.body.code if isinstance(reply.body, Failure) else "") == wanted


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_a_record_cut_anywhere_never_gives_a_wrong_answer(name: str, ram: Path, steps: list[int]) -> None:
    desk = Desk(ram, toy_plan(name))
    first = blob(desk.ask())
    (path,) = (desk.site.folder / "memory" / "run").iterdir()
    whole = path.read_bytes()
    steps.clear()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert code(desk.ask()) == "lost"
        if name == "scaffold":  # nor does a later round go on from a wrong state
            assert code(desk.ask(desk.asked(round=2, settled=(1, 0)))) == "lost"
    path.write_bytes(whole)
    assert blob(desk.ask()) == first
    assert steps == []


# ---- the log of what was asked and what left


@pytest.fixture
def logged(ram: Path) -> tuple[Desk, Audit]:
    desk, log = Desk(ram, toy_plan()), Audit(ram / "audit.jsonl")
    desk.site = replace(desk.site, audit=log)
    return desk, log


def test_nothing_is_done_before_it_stands_in_the_log(
    logged: tuple[Desk, Audit], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, log = logged
    true, seen = Audit.add, []

    def add(self: Audit, event: str, **facts: Any) -> Head:
        seen.append((event, len(steps), len(desk.files())))
        head = true(self, event, **facts)
        assert Audit(log.path).verify() == head  # another process would see it
        return head

    monkeypatch.setattr(Audit, "add", add)
    given = blob(desk.ask())
    assert seen == [("request", 0, 0), ("answer", 4, 1)]
    assert log.events()[-1]["sha256"] == hashlib.sha256(given).hexdigest()
    assert log.events()[-1]["bytes"] == len(given)
    assert blob(desk.ask()) == given  # the same bytes left twice, and it says so
    assert [e["event"] for e in log.events()] == ["request", "answer"] * 2
    assert code(desk.ask(desk.asked(plan="0" * 64))) == "plan"
    refusal, incident = log.events()[-1], desk.incidents()[-1]
    assert (refusal["event"], refusal["code"]) == ("refusal", "plan")
    assert refusal["incident"] == incident["incident"]


def test_what_cannot_be_written_down_does_not_leave(
    logged: tuple[Desk, Audit], steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, log = logged
    true = Audit.add

    def full(self: Audit, event: str, **facts: Any) -> Head:
        if event == "answer":
            raise Stop(Exit.DISK_FULL, "disk full")
        return true(self, event, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(Audit, "add", full)
        assert code(desk.ask()) == "disk"
    assert len(steps) == 4
    steps.clear()
    assert isinstance(desk.ask().body, Update)  # what was kept goes out now
    assert steps == []
    log.path.write_bytes(log.path.read_bytes().replace(b"train", b"toast"))
    log.head_path.unlink()
    assert code(desk.ask(desk.asked(round=2))) == "internal"
    assert steps == []


def test_the_log_names_no_patient_and_no_place(logged: tuple[Desk, Audit], ram: Path) -> None:
    desk, log = logged
    desk.ask()
    desk.ask(desk.asked("evaluate/federated/val"), kind="federated", split="val")
    desk.propose(desk.plan.canonical())
    desk.ask(desk.asked("x" * 1000, run=f"../{ram}/{'y' * 1000}\x1b[2J"))
    events = log.events()
    assert len(events) == 8
    known = {"n", "time", "event", "before", "run", "round", "attempt", "stage"}
    assert {key for e in events for key in e} == known | {"plan", "bytes", "sha256", "code", "incident"}
    assert max(len(str(value)) for e in events for value in e.values()) == 64
    own = [e for e in events[:6] for value in e.values() if str(ram) in str(value)]
    people = {c.patient for c in desk.cases["site_0"]["train"]} | {
        c.key for c in desk.cases["site_0"]["train"]
    }
    assert own == []
    assert not any(name in log.path.read_text() for name in people)


# ---- refusals


def test_codes_of_whoever_is_meant(ram: Path, steps: list[int]) -> None:
    desk = Desk(ram, toy_plan())
    assert code(desk.ask(desk.asked(site="site_1"))) == "addressee"
    assert code(desk.ask(desk.asked(code="0" * 64))) == "code"
    assert code(desk.ask(desk.asked(plan="0" * 64))) == "plan"
    assert steps == []
    assert desk.files() == {}
    # whose code it is comes before what the plan says: another version may not even read it
    assert code(desk.site.handle(desk.asked("plan", code="0" * 64), {"plan": "?"})) == "code"


@pytest.mark.parametrize("run", ["", "..", "../out", "/tmp/out", "a/b", "a.b", "x" * 65, "a\0b", "run\n"])
def test_a_runs_name_cannot_lead_out_of_the_sites_folder(run: str, ram: Path, steps: list[int]) -> None:
    desk = Desk(ram / "here", toy_plan("scaffold"))
    before = sorted(ram.rglob("*.safetensors"))
    assert code(desk.ask(desk.asked(run=run))) == "payload"
    assert steps == []
    assert sorted(ram.rglob("*.safetensors")) == before


def test_a_plan_is_taken_only_from_the_folder_of_accepted_ones(ram: Path) -> None:
    desk = Desk(ram, toy_plan())
    (ram / "sites" / "other.json").write_text(desk.plan.canonical())
    desk.restart()
    assert code(desk.ask(desk.asked(plan="../other"))) == "plan"
    assert code(desk.ask(desk.asked(plan=str(ram / "sites" / "other")))) == "plan"
    blob(desk.ask())  # a process that starts later knows what was accepted


def tampered(change: Callable[[dict[str, Any]], None]) -> str:
    tree = json.loads(toy_plan().canonical())
    change(tree)
    return json.dumps(tree, sort_keys=True, separators=(",", ":"))


PLANS: dict[str, tuple[object, str]] = {
    "no text": (None, "plan"),
    "a number": (3, "plan"),
    "no JSON": ("{", "plan"),
    "a list": ("[]", "plan"),
    "spaces": (json.dumps(json.loads(toy_plan().canonical()), sort_keys=True), "plan"),
    "another order of keys": (
        json.dumps(dict(reversed(json.loads(toy_plan().canonical()).items())), separators=(",", ":")),
        "plan",
    ),
    "an unknown key": (tampered(lambda tree: tree.update(extra=1)), "plan"),
    "a missing key": (tampered(lambda tree: tree.pop("privacy")), "plan"),  # has a default: not canonical
    "out of range": (tampered(lambda tree: tree["local"].update(steps=0)), "plan"),
    "an unknown task": (tampered(lambda tree: tree["task"].update(name="poker")), "plan"),
    "an unknown strategy": (tampered(lambda tree: tree["strategy"].update(name="fedsgd")), "plan"),
    "an unknown setting": (tampered(lambda tree: tree["strategy"].update(mu=1)), "plan"),
    "bounds too wide": (
        tampered(lambda tree: tree["federation"].update(max_weight=2**20, max_value=2.0**20)),
        "plan",
    ),
    "a task that is not allowed": (tampered(lambda tree: tree["task"].update(name="tiny_net")), "policy"),
    "a model that is not allowed": (tampered(lambda tree: tree["model"].update(name="other")), "policy"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_is_refused(case: str, ram: Path) -> None:
    text, wanted = PLANS[case]
    desk = Desk(ram, toy_plan())
    desk.policy = Policy(tasks=("quadratic", "poker"), models=("none",), minimum_cell=1)
    desk.restart()
    digest = hashlib.sha256(str(text).encode()).hexdigest()
    assert code(desk.propose(text, digest)) == wanted
    assert code(desk.ask(desk.asked(plan=digest))) == "plan"
    assert len(list((ram / "sites" / "plans").iterdir())) == 1


def test_a_plan_under_another_digest_is_refused(ram: Path) -> None:
    desk = Desk(ram, toy_plan())
    assert code(desk.propose(toy_plan("fedprox").canonical())) == "plan"


def test_a_policy_that_was_narrowed_later_rules_accepted_plans_too(ram: Path, steps: list[int]) -> None:
    desk = Desk(ram, toy_plan())
    for policy in (Policy(tasks=("segmentation",)), Policy(models=())):
        desk.policy = policy
        desk.restart()
        assert code(desk.ask()) == "policy"
    assert steps == []


@pytest.mark.parametrize("cell", [1, 3, 4])
def test_statistics_leave_only_over_enough_patients(cell: int, ram: Path) -> None:
    cases = toy_cases(1, 3)
    cases["site_0"]["val"] = cases["site_0"]["val"][:1]
    desk = Desk(ram, toy_plan(), policy=Policy(minimum_cell=cell), cases=cases)
    trivial = desk.ask(desk.asked("trivial/constant"))
    val = desk.ask(desk.asked("evaluate/federated/val"), kind="federated", split="val")
    outcomes = [reply.body.code if isinstance(reply.body, Failure) else "" for reply in (trivial, val)]
    assert outcomes == ["policy" if cell > n else "" for n in (3, 1)]
    unknown = desk.ask(desk.asked("evaluate/federated/other"), kind="federated", split="other")
    assert code(unknown) == "stage"


def test_statistics_may_stay_home_altogether(ram: Path) -> None:
    desk = Desk(ram, toy_plan(), policy=Policy(statistics="none", minimum_cell=1))
    assert code(desk.ask(desk.asked("trivial/constant"))) == "policy"
    for kind, name in (("federated", "federated"), ("trivial", "constant")):
        down: Tree = {"kind": kind, "split": "val", "name": "constant", "known": {}}
        assert code(desk.ask(desk.asked(f"evaluate/{name}/val"), **down)) == "policy"
    blob(desk.ask())  # training is another matter


def test_stages_that_nobody_knows(ram: Path, steps: list[int]) -> None:
    desk = Desk(ram, toy_plan())
    for stage in ("", "unmask", "trivial/horoscope", "trivial", "Train"):
        assert code(desk.ask(desk.asked(stage))) == "stage"
    for kind in ("personal", "palm"):  # FedAvg makes no personal model
        assert code(desk.ask(desk.asked(f"evaluate/{kind}/val"), kind=kind, split="val")) == "stage"
    assert steps == []


def test_state_that_is_lost_or_unknown_to_the_coordinator(ram: Path, steps: list[int]) -> None:
    desk = Desk(ram, toy_plan("scaffold", federation={"rounds": 5}))
    assert code(desk.ask(desk.asked(round=5, settled=(4, 0)))) == "lost"
    for r in (1, 2, 3):
        blob(desk.ask(desk.asked(round=r, settled=(r - 1, 0) if r > 1 else None)))
    steps.clear()
    assert code(desk.ask(desk.asked(round=4, settled=(3, 1)))) == "lost"  # another attempt
    assert code(desk.ask(desk.asked(round=2, attempt=1))) == "rewound"
    assert steps == []
    blob(desk.ask(desk.asked(round=4, settled=(3, 0))))  # the refusals changed nothing


def test_a_site_without_training_patients_says_so(ram: Path) -> None:
    cases = toy_cases(1, 3)
    cases["site_0"]["train"] = []
    assert code(Desk(ram, toy_plan(), cases=cases).ask()) == "data"


def test_the_plan_section_names_are_as_the_policy_expects() -> None:
    policy = Policy(tasks=("quadratic",), models=("none",))
    policy.check(toy_plan())
    with pytest.raises(Refused, match="policy: model unet"):
        policy.check(toy_plan().model_copy(update={"model": Section(name="unet")}))
