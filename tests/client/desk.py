"""A coordinator's desk in front of one site: what the tests of the gate work with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from client.policy import Policy
from client.site import Site
from conf.schema import Plan
from strategies.code import code_digest
from strategies.protocol import Failure, Instruction, Reply, Tree, Update, pack
from tests.toys import Toys, toy_cases


@dataclass
class Desk:
    """A coordinator's desk in front of one site, whose process may end and start anew."""

    folder: Path
    plan: Plan
    durable: bool = True
    policy: Policy = field(default_factory=lambda: Policy(minimum_cell=1, patients_per_feature=0))
    cases: Any = field(default_factory=lambda: toy_cases(1, 3))

    def __post_init__(self) -> None:
        self.restart()
        self.study, self.strategy = self.site.bench.study(self.plan)
        assert isinstance(self.propose(self.plan.canonical()).body, Update)

    def restart(self) -> None:
        made = Toys(self.folder, self.plan, self.cases, durable=self.durable).site("site_0")
        self.site: Site = replace(made, policy=self.policy)

    def propose(self, text: object, digest: str | None = None) -> Reply:
        return self.site.handle(self.asked("plan", plan=digest or self.plan.digest), {"plan": text})

    def asked(self, stage: str = "train", **changes: Any) -> Instruction:
        given: dict[str, Any] = {
            "run": "run",
            "round": 1,
            "attempt": 0,
            "settled": None,
            "plan": self.plan.digest,
            "code": code_digest(),
            "common": "",
            "site": "site_0",
        }
        return Instruction(stage=stage, **{**given, **changes})

    @property
    def down(self) -> Tree:
        state = self.strategy.start(self.study, ("site_0",))
        return self.strategy.down(state, self.study.initial, self.study)

    def ask(self, instruction: Instruction | None = None, **common: Any) -> Reply:
        return self.site.handle(instruction or self.asked(), {**self.down, **common})

    def files(self) -> dict[str, bytes]:
        memory = self.site.folder / "memory" / "run"
        return {p.name: p.read_bytes() for p in memory.iterdir()} if memory.exists() else {}

    def incidents(self) -> list[dict[str, str]]:
        path = self.site.folder / "incidents.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def code(reply: Reply) -> str:
    assert isinstance(reply.body, Failure), reply.body
    return reply.body.code


def blob(reply: Reply) -> bytes:
    assert isinstance(reply.body, Update), reply.body
    return pack(reply.to_tree())
