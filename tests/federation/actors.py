"""Toy sites that Ray actors can make: what they hold is sent there, so it is no closure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from client.train import Bench
from conf.schema import Plan
from server.exchange import Handler
from tasks import TASKS
from tasks.base import Case
from tests.toys import TOYS, Fatal, Toys

TASKS._entries.update(TOYS)


@dataclass(frozen=True)
class Hospitals:
    """Makes the sites of a toy federation; `site_3` is deadly `times` times."""

    folder: Path
    plan: Plan
    cases: Mapping[str, Mapping[str, Sequence[Case]]]
    times: int = 0

    @cached_property
    def bench(self) -> Bench:
        return Bench("cpu")

    def __call__(self, name: str) -> Handler:
        site = Toys(self.folder, self.plan, self.cases).site(name, self.bench)
        return Fatal(site, self.folder / "marks", self.times) if name == "site_3" else site
