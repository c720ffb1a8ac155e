"""The gate of a hospital: every instruction enters here, and nothing leaves but through here.

The order is the safety: who is meant and which code and plan → what was already answered → which state
counts → the strategy's answer → is it of the form the plan allows → keep it → write it down → let it go.
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from client.audit import Audit
from client.chain import Scalar
from client.errors import report
from client.ledger import Ledger
from client.policy import Policy
from client.private import Charges
from client.promise import hold
from client.state import Memory
from client.train import Archive, Bench, Session
from conf.files import write_atomic
from conf.schema import Plan
from strategies.privacy.accountant import Entry
from strategies.protocol import DIGEST, Instruction, Refused, Reply, Tree, Update, digest, pack, unpack

__all__ = ["Archive", "Bench", "Ledger", "Plans", "Policy", "Site"]

# what an instruction names becomes part of a path at the site: nothing else may
_RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SHOWN = 64  # characters of a coordinator's word that go into the log


class Plans:
    """The plans a site has accepted, by digest, as files: a process that starts later knows them too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Plan] = {}

    def __getitem__(self, digest: str) -> Plan:
        """The accepted plan.

        Raises:
            Refused: (`plan`) no such plan was accepted.
        """
        if digest not in self._known:
            path = self._folder / f"{digest}.json"
            if not DIGEST.fullmatch(digest) or not path.is_file():
                raise Refused("plan", "not accepted")
            self._known[digest] = Plan.model_validate_json(path.read_bytes())
        return self._known[digest]

    def initial(self, sha256: str) -> Tree:
        """The first weights that came with a plan.

        Raises:
            Refused: (`plan`) none did.
        """
        try:
            return unpack((self._folder / f"{sha256}.safetensors").read_bytes())
        except FileNotFoundError:
            raise Refused("plan", "no first weights") from None

    def accept(self, plan: Plan, initial: Tree) -> None:
        """Remember a plan, and the first weights where they came with it."""
        path, weights = self._folder / f"{plan.digest}.json", self._folder / f"{plan.init}.safetensors"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            if plan.init is not None and not weights.exists():
                write_atomic(weights, pack(initial))
            write_atomic(path, plan.canonical().encode())
        self._known[plan.digest] = plan


class Shelf(Protocol):
    """Where a run finds its cases: one archive, or one that is frozen for each run."""

    def of(self, run: str) -> Archive:
        """The cases of a run."""


@dataclass(frozen=True)
class Site:
    """One site. In simulation many share a bench and a folder of plans; the code is the same.

    Attributes:
        folder: the site's own files (state, replies, incidents). code: digest of the code that runs here.
        durable: keep every reply before it leaves (deployed). Simulated sites may also tell exact metrics
            of a private run, which no noise covers, and each patient's own scores; a deployed one never
            does.
        ledger: the privacy account; without one nothing private is trained.
        audit: log of what was asked and what left (deployed): nothing leaves before it stands there.
    """

    name: str
    archive: Shelf
    policy: Policy
    bench: Bench
    plans: Plans
    folder: Path
    code: str
    durable: bool = True
    ledger: Ledger | None = None
    audit: Audit | None = None

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        """Answer an instruction. Never raises: an error becomes a code, its detail stays in the own log."""
        try:
            self._record("request", instruction, plan=instruction.plan[:_SHOWN])
            reply = self._answer(instruction, common)
            if self.audit is not None:
                blob = pack(reply.to_tree())
                self._record("answer", instruction, bytes=len(blob), sha256=digest(blob))
            return reply
        except Exception as error:  # noqa: BLE001  the boundary: exception text must not leave a hospital
            failure = report(error, self.folder / "incidents.jsonl")
            with suppress(Exception):  # the log may be what failed; a code leaves all the same
                self._record("refusal", instruction, code=failure.code, incident=failure.incident)
            return Reply(self.name, failure)

    def _record(self, event: str, asked: Instruction, **facts: Scalar) -> None:
        """Write down, durably, what was asked or leaves. Whoever asked chose the words: they are cut."""
        if self.audit is not None:
            which: dict[str, Scalar] = {
                "round": asked.round,
                "attempt": asked.attempt,
                "stage": asked.stage[:_SHOWN],
            }
            self.audit.add(event, run=asked.run[:_SHOWN], **which, **facts)

    def charged(self, run: str) -> list[Entry]:
        """What a run has reserved in the ledger."""
        lines = self.ledger.lines()[0] if self.ledger is not None else []
        return [line.entry for line in lines if line.run == run]

    def _answer(self, instruction: Instruction, common: Tree) -> Reply:
        if instruction.site != self.name:
            raise Refused("addressee", instruction.site)
        if instruction.code != self.code:
            raise Refused("code", instruction.code[:16])
        if not _RUN.fullmatch(instruction.run):
            raise Refused("payload", f"run {instruction.run[:64]!r}")
        # it may be another when the instruction comes again, and is no part of what was asked
        anchor = instruction.own.get("anchor")
        instruction = replace(instruction, own={k: v for k, v in instruction.own.items() if k != "anchor"})
        if instruction.stage == "plan":
            return self._accept(instruction, common, anchor)
        plan = self.plans[instruction.plan]
        self.policy.check(plan)
        study, strategy = self.bench.study(plan, self.plans.initial)
        if self.durable:
            hold(instruction, common, study, strategy)
        spec = self.bench.spec(study, strategy, instruction.stage)
        remembers = self.durable or strategy.stateful
        memory = Memory(self.folder / "memory" / instruction.run, durable=self.durable)
        if remembers and (given := memory.recall(instruction)) is not None:
            return given
        state = memory.settle(instruction.settled) if strategy.stateful else {}
        archive = self.archive.of(instruction.run)
        policy, charges = self.policy.within(plan) if self.durable else self.policy, None
        if plan.privacy.mode == "dpsgd" and self.ledger is not None:
            self._hold(anchor)
            left = plan.federation.rounds - instruction.round + 1
            charges = Charges(self.ledger, instruction.run, left)
        session = Session(
            self.bench, study, archive, policy, instruction, common, state, charges, rows=not self.durable
        )
        update, after = strategy.answer(instruction.stage, session)
        update = Update(
            {name: t.detach().cpu() for name, t in update.tensors.items()}, update.weight, update.form
        )
        (replace(spec, tail=0) if self.durable else spec).check(update)
        reply = Reply(self.name, update, self._head(plan))
        if remembers:
            memory.keep(instruction, reply, after)
        if charges is not None:
            charges.settle()
        return reply

    def _accept(self, instruction: Instruction, common: Tree, anchor: object) -> Reply:
        """The stage `plan`: read it, hold it against the site's rules, remember it."""
        text = common.get("plan")
        if not isinstance(text, str) or hashlib.sha256(text.encode()).hexdigest() != instruction.plan:
            raise Refused("plan", "digest")
        try:
            plan = Plan.model_validate(json.loads(text))
        except (ValidationError, json.JSONDecodeError) as error:
            raise Refused("plan", type(error).__name__) from None
        if plan.digest != instruction.plan:
            raise Refused("plan", "not canonical")
        self.policy.check(plan)
        study, _ = self.bench.study(plan, lambda _: common.get("initial"))
        if plan.privacy.mode == "dpsgd":
            if self.ledger is None:
                raise Refused("policy", "no privacy ledger")
            self.bench.vet(plan, self.archive.of(instruction.run))
            self._hold(anchor)
        self.plans.accept(plan, study.initial)
        return Reply(self.name, Update({}), self._head(plan))

    def _head(self, plan: Plan) -> str:
        """What a hospital's reply tells of its ledger, for the coordinator to keep."""
        if self.ledger is None or not self.durable or plan.privacy.mode != "dpsgd":
            return ""
        return self.ledger.head.hex()

    def _hold(self, anchor: object) -> None:
        """Hold the ledger against the head that the coordinator has kept of it, where it has one.

        Raises:
            Stop: (`LEDGER_BROKEN`). Refused: (`payload`).
        """
        if anchor is None or self.ledger is None:
            return
        if not isinstance(anchor, str) or not DIGEST.fullmatch(anchor):
            raise Refused("payload", "anchor")
        self.ledger.check(bytes.fromhex(anchor))
