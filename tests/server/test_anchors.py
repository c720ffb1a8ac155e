"""Heads of the sites' ledgers at the coordinator: a ledger put back with all its files is found out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from client.ledger import Ledger
from client.restore import restore
from conf.exits import Exit, Stop
from server.anchors import Anchors
from server.exchange.flower import FlowerExchange
from server.rounds import Run
from strategies import build_strategy
from strategies.base import Study
from strategies.code import code_digest
from strategies.protocol import Failure, Instruction, Refused, Reply, Tree, Update, pack
from tests.client.test_private import private
from tests.server.exchange.test_flower import SITES, Wire
from tests.toys import Toys, toy_cases


def train(folder: Path, run: str) -> None:
    """A private run over the wire, the coordinator and all sites' processes new."""
    plan = private(federation={"rounds": 1, "min_replies": 3}, local={"batch_size": 2})
    exchange = FlowerExchange(
        Wire(Toys(folder, plan, toy_cases(), durable=True)),
        blobs=folder / "blobs",
        wait_s=0.05,
        anchors=Anchors(folder / "anchors.json"),
    )
    Run(Study.of(plan), build_strategy(plan), SITES, exchange, folder / run, run, code_digest()).train()


def test_a_ledger_rolled_back_with_its_head_trains_again_only_when_restored(ram: Path) -> None:
    train(ram, "one")
    here = ram / "sites" / "site_1"
    shutil.copytree(here, ram / "old")
    train(ram, "two")
    known = json.loads((ram / "anchors.json").read_text())
    assert set(known) == set(SITES)
    shutil.copy(here / "ledger.jsonl", ram / "backup")
    for name in ("ledger.jsonl", "ledger.head"):
        shutil.copy(ram / "old" / name, here / name)
    with pytest.raises(Stop, match="2 sites accept the plan; need 3: ledger: site_1") as stop:
        train(ram, "three")
    assert stop.value.exit == Exit.SITE_REFUSED
    restore(here / "ledger.jsonl", ram / "backup", bytes.fromhex(known["site_1"]), [], "patients")
    train(ram, "four")
    assert [line.run for line in Ledger(here / "ledger.jsonl", None).lines()[0]] == ["one", "two", "four"]


def test_a_ledger_put_back_between_two_rounds_is_found_out(ram: Path) -> None:
    """As when a machine goes back to yesterday's image, in the middle of a run."""
    train(ram, "one")
    here, plan = ram / "sites" / "site_1", private(federation={"rounds": 2, "min_replies": 3})
    shutil.copytree(here, ram / "old")

    def wire() -> Wire:
        return Wire(Toys(ram, plan, toy_cases(), durable=True))

    anchors = Anchors(ram / "anchors.json")
    exchange = FlowerExchange(wire(), blobs=ram / "blobs", wait_s=0.05, anchors=anchors)

    def watch(event: str, r: int) -> None:
        if (event, r) == ("checkpoint", 1):
            for name in ("ledger.jsonl", "ledger.head"):
                shutil.copy(ram / "old" / name, here / name)
            exchange.courier = wire()

    run = Run(
        Study.of(plan), build_strategy(plan), SITES, exchange, ram / "two", "two", code_digest(), watch=watch
    )
    with pytest.raises(Stop, match="2 valid replies, need 3: ledger: site_1"):
        run.train(evaluate=False)
    known = json.loads((ram / "anchors.json").read_text())
    # the coordinator still has the head that the ledger lost, to restore it by
    with pytest.raises(Stop, match="never ended with the anchor"):
        Ledger(here / "ledger.jsonl", None).check(bytes.fromhex(known["site_1"]))


def test_an_instruction_that_comes_again_with_a_newer_head_gets_the_same_bytes(ram: Path) -> None:
    plan = private(federation={"rounds": 1})
    site = Toys(ram, plan, toy_cases(), durable=True).site("site_0")
    down = {"model": Study.of(plan).initial}

    def asked(stage: str, common: Tree, anchor: str = "") -> Reply:
        own = {"anchor": anchor} if anchor else {}
        text = Instruction("run", 1, 0, stage, "site_0", None, plan.digest, code_digest(), "", own)
        return site.handle(text, common)

    first = asked("plan", {"plan": plan.canonical()})
    replies = [asked("train", down, head) for head in ("", first.head, asked("train", down).head, "ff" * 32)]
    assert isinstance(replies[0].body, Update)
    assert len({pack(reply.to_tree()) for reply in replies}) == 1
    again = asked("train/2", down, "ff" * 32)
    assert isinstance(again.body, Failure)
    assert again.body.code == "ledger"


def test_a_reply_tells_32_bytes_and_no_word() -> None:
    reply = Reply("a", Update({}), "0f" * 32)
    assert Reply.from_tree(reply.to_tree()) == reply
    assert "head" not in Reply("a", Update({})).to_tree()
    for head in ("", "0f" * 31, "DOE^JANE", 7, None):
        with pytest.raises(Refused, match="form"):
            Reply.from_tree({**reply.to_tree(), "head": head})


def test_heads_outlive_the_process_and_a_broken_file_is_said(tmp_path: Path) -> None:
    path = tmp_path / "anchors.json"
    Anchors(path).note("a", "0f" * 32)
    assert Anchors(path).own("a") == {"anchor": "0f" * 32}
    assert Anchors(path).own("b") == {}
    for text in ("[]", "no JSON"):
        path.write_text(text)
        with pytest.raises(Stop, match="no list of heads by site; put its backup in its place"):
            Anchors(path)
