"""Toy sites that Ray actors can make: what they hold is sent there, so it is no closure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from client.train import Bench
from server.exchange import Handler
from strategies.protocol import Instruction, Reply, Tree
from tasks import TASKS
from tasks.base import Case
from tests.toys import TOYS, Fatal, Toys, toy_plan

TASKS._entries.update(TOYS)


@dataclass(frozen=True)
class Due:
    """A site that is deadly in the runs that have a folder below `marks`, as often as its name says."""

    site: Handler
    marks: Path

    def handle(self, instruction: Instruction, common: Tree) -> Reply:
        site = self.site
        for due in self.marks.glob(f"{instruction.run}-*"):
            site = Fatal(site, due, int(due.name.rpartition("-")[2]))
        return site.handle(instruction, common)


@dataclass(frozen=True)
class Hospitals:
    """Makes the sites of a toy federation, for any number of runs; `site_3` may be deadly."""

    folder: Path
    cases: Mapping[str, Mapping[str, Sequence[Case]]]

    @cached_property
    def bench(self) -> Bench:
        return Bench("cpu")

    def __call__(self, name: str) -> Handler:
        # a site learns the plan with each run
        site = Toys(self.folder, toy_plan(), self.cases).site(name, self.bench)
        return Due(site, self.folder / "marks") if name == "site_3" else site
