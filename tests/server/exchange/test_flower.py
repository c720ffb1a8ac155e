"""Whatever happens on the way, what counts is folded once, and the rest is a known failure."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from server.exchange import flower
from server.exchange.flower import Courier, FlowerExchange, Node
from server.rounds import Run
from strategies import build_strategy
from strategies.base import Study
from strategies.code import code_digest
from strategies.letter import Answer, Call
from strategies.protocol import Instruction, Reply, Update, digest, pack, unpack
from tests.toys import Toys, toy_cases, toy_plan

SITES = sorted(toy_cases())
NODES = {name: 100 + i for i, name in enumerate(SITES)}
OF = {node: name for name, node in NODES.items()}


class Wire(Courier):
    """Toy sites behind a wire that loses, delays and repeats.

    `script[site]` is what happens to its next calls of operation `train` and `collect` in `train` stages;
    afterwards all goes well. `gone` is how many looks a site stays offline after `leave`.
    """

    def __init__(self, toys: Toys, **script: list[str]) -> None:
        self.sites = {name: toys.site(name) for name in SITES}
        self.script = {name: deque(script.get(name, [])) for name in SITES}
        self.jobs: dict[str, bytes] = {}  # key → reply of work that was done
        self.posted: dict[str, Answer | None] = {}
        self.seen: list[tuple[str, str]] = []
        self.since = dict.fromkeys(SITES, 0)
        self.gone = dict.fromkeys(SITES, 0)
        self.count = 0
        self.largest = 0

    def nodes(self) -> dict[str, Node]:
        here = {name: Node(NODES[name], str(self.since[name])) for name in SITES if not self.gone[name]}
        self.gone = {name: max(0, left - 1) for name, left in self.gone.items()}
        return here

    def send(self, calls: Mapping[int, Call], group: str) -> dict[str, int]:
        sent = {}
        for node, call in calls.items():
            self.count += 1
            letter = f"letter-{self.count}"
            sent[letter] = node
            event = "answer"
            if "train" in group and call.operation != "cancel" and self.script[OF[node]]:
                event = self.script[OF[node]].popleft()
            if "train" in group or call.operation == "cancel":
                self.seen.append((OF[node], call.operation))
            self.deliver(letter, OF[node], call, event)
        return sent

    def deliver(self, letter: str, name: str, call: Call, event: str) -> None:
        if event == "refused post":
            return
        if call.operation == "train" and event not in ("away", "lost", "silent", "busy"):
            instruction = Instruction.from_tree(unpack(call.instruction))
            assert digest(call.common) == instruction.common
            self.jobs[call.key] = pack(self.sites[name].handle(instruction, unpack(call.common)).to_tree())
        elif call.operation == "collect" and event == "answer" and call.key not in self.jobs:
            event = "unknown"
        if event in ("restart", "leave"):  # the agent took the call in and died
            self.since[name] += 1
            self.gone[name] = 3 if event == "leave" else 0
        elif event != "silent":
            self.posted[letter] = self.answer(name, call.key, event)

    def answer(self, name: str, key: str, event: str) -> Answer | None:
        reply = self.jobs.get(key, b"")
        match event:
            case "answer":
                return Answer("reply", key, reply)
            case "lost":
                return None
            case "garbage":
                return Answer("reply", key, b"garbage")
            case "nan":
                nan = Update({"delta/w": torch.full((3,), torch.nan)}, 2)
                return Answer("reply", key, pack(Reply(name, nan).to_tree()))
            case "another's key":
                return Answer("reply", "1" * 64, reply)
            case "impostor":
                other = replace(Reply.from_tree(unpack(reply)), site="site_9")
                return Answer("reply", key, pack(other.to_tree()))
        return Answer(event, key)

    def ready(self, ids: Iterable[str]) -> Iterator[tuple[str, Answer | None]]:
        for letter in list(ids):
            if letter in self.posted:
                yield letter, self.posted.pop(letter)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_SHORTEST_S": 0.001, "_LOOK_S": 0.01, "_AGAIN_S": 0.005, "_OVERDUE_S": 0.1}.items():
        monkeypatch.setattr(flower, name, value)


def run(folder: Path, wire: Wire, strategy: str = "fedavg", **rules: object) -> Toys:
    made = Toys(folder, toy_plan(strategy, federation={"rounds": 2, **rules}), toy_cases())
    plan = made.plan
    exchange = FlowerExchange(wire, blobs=folder / "blobs", wait_s=0.05)
    Run(Study.of(plan), build_strategy(plan), SITES, exchange, folder, "run", code_digest()).train()
    return made


def toys(folder: Path) -> Toys:
    return Toys(folder, toy_plan(), toy_cases(), durable=True)


TROUBLE = {
    "nothing": [],
    "long work": ["pending", "pending", "pending"],
    "trainer restarts": ["away", "away", "pending", "unknown"],
    "work lost in a restart": ["pending", "away", "away"],
    "full queue": ["busy", "busy"],
    "agent dies with the call": ["restart"],
    "agent stays away for a while": ["leave"],
    "SuperLink loses a letter": ["lost", "lost"],
    "silence": ["silent"],
    "SuperLink does not take a letter": ["refused post"],
    "an answer to something else": ["another's key"],
}


@pytest.mark.parametrize("strategy", ["fedavg", "scaffold", "median"])
@pytest.mark.parametrize("what", TROUBLE)
def test_trouble_changes_nothing(what: str, strategy: str, ram: Path) -> None:
    wire = Wire(toys(ram / "b"), site_1=TROUBLE[what])
    made = run(ram / "b", wire, strategy)
    assert not wire.script["site_1"]
    whole = Toys(ram / "a", made.plan, toy_cases())
    whole.train()
    assert made.ending() == whole.ending()


def test_a_fingerprint_goes_the_same_way(ram: Path) -> None:
    run(ram / "b", Wire(toys(ram / "b")), "fingerprint", rounds=1)
    Toys(ram / "a", toy_plan("fingerprint", federation={"rounds": 1}), toy_cases()).train()
    names = ("strategy.safetensors", "model.safetensors", "state.json")
    for name in names:
        ends = [(ram / end / "checkpoints" / "round-0001" / name).read_bytes() for end in "ab"]
        assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("event", "code"),
    [
        ("garbage", "payload"),
        ("nan", "finite"),
        ("impostor", "addressee"),
        ("policy", "policy"),
        ("payload", "payload"),
        ("internal", "internal"),
    ],
)
def test_what_may_not_be_folded_fails_that_site_alone(event: str, code: str, ram: Path) -> None:
    made = run(ram, Wire(toys(ram), site_1=[event]))
    journal = (made.folder / "journal.jsonl").read_text()
    assert journal.count('"code"') == 1
    assert f'"site": "site_1", "code": "{code}"' in journal
    assert '"stage": "train", "answered": ["site_0", "site_2"]' in journal


@pytest.mark.parametrize("event", ["away", "lost", "silent", "restart", "another's key"])
def test_a_site_that_never_answers_is_lost(event: str, ram: Path) -> None:
    wire = Wire(toys(ram), site_1=[event] * 10_000)
    made = run_lost(ram, wire)
    assert '"site": "site_1", "code": "lost_site"' in (made.folder / "journal.jsonl").read_text()


def run_lost(folder: Path, wire: Wire) -> Toys:
    made = Toys(folder, toy_plan(federation={"rounds": 1, "min_replies": 2}), toy_cases())
    exchange = FlowerExchange(wire, blobs=folder / "blobs", wait_s=0.05, lost_after_s=0.3)
    study, strategy = Study.of(made.plan), build_strategy(made.plan)
    Run(study, strategy, SITES, exchange, folder, "run", code_digest()).train()
    return made


def test_a_site_that_is_never_online_is_lost(ram: Path) -> None:
    wire = Wire(toys(ram))
    wire.gone["site_2"] = 10**6
    made = run_lost(ram, wire)
    assert '"site": "site_2", "code": "lost_site"' in (made.folder / "journal.jsonl").read_text()


def test_the_deadline_cancels(ram: Path) -> None:
    wire = Wire(toys(ram), site_1=["pending"] * 10**5)
    made = run(ram, wire, round_timeout_s=0.3)
    assert '"site": "site_1", "code": "deadline"' in (made.folder / "journal.jsonl").read_text()
    assert ("site_1", "cancel") in wire.seen
    assert ("site_0", "cancel") not in wire.seen


def test_late_letters_are_taken_from_superlink_in_a_later_ask(ram: Path) -> None:
    wire = Wire(toys(ram), site_1=["silent"])
    made = Toys(ram, toy_plan(federation={"rounds": 1, "round_timeout_s": 0.2}), toy_cases())
    exchange = FlowerExchange(wire, blobs=ram / "blobs", wait_s=30.0)
    study, strategy = Study.of(made.plan), build_strategy(made.plan)
    asked = Run(study, strategy, SITES, exchange, ram, "run", code_digest())
    asked.train(evaluate=False)
    assert '"site": "site_1", "code": "deadline"' in (ram / "journal.jsonl").read_text()
    late = [letter for letter in exchange._strays if letter not in wire.posted]
    assert len(late) == 1
    wire.posted[late[0]] = Answer("reply", "0" * 64, b"late")
    asked.score("federated", {"kind": "federated", **strategy.down({}, study.initial, study)}, "val")
    assert not exchange._strays
    assert not wire.posted


class Stopped(BaseException):
    """The run is over, says SuperLink."""


def test_a_stopped_run_leaves_no_spooled_answer(ram: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(ram / "spool"))
    (ram / "spool").mkdir()
    wire = Wire(toys(ram), site_2=["silent"])
    send, posts = wire.send, 0

    def stop(calls: Mapping[int, Call], group: str) -> dict[str, int]:
        nonlocal posts
        posts += "train" in group
        if posts == 2:
            assert len(list((ram / "spool").iterdir())) == 2
            raise Stopped
        return send(calls, group)

    monkeypatch.setattr(wire, "send", stop)
    with pytest.raises(Stopped):
        run(ram, wire, "median")
    assert not list((ram / "spool").iterdir())


def test_an_asynchronous_run_waits_for_as_many_as_it_needs(ram: Path) -> None:
    wire = Wire(toys(ram), site_1=["pending"] * 5)
    made = Toys(ram, toy_plan("fedbuff", federation={"rounds": 4}), toy_cases())
    exchange = FlowerExchange(wire, blobs=ram / "blobs", wait_s=0.05)
    study, strategy = Study.of(made.plan), build_strategy(made.plan)
    asked = Run(study, strategy, SITES, exchange, ram, "run", code_digest())
    assert asked.train().round == 4
    # jobs that outlive the run can be taken up by another process
    again = FlowerExchange(wire, blobs=ram / "blobs", wait_s=0.05)
    again.restore(exchange.snapshot(), "run")
    assert again.busy() == exchange.busy()
    assert again.snapshot() == exchange.snapshot()
